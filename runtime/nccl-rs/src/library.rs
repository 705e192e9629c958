//! The library: finding it, its functions, its version.

use std::error::Error as _;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::nccl::sys;

use crate::{Code, Error, LoadError, UniqueId};

/// Names of the library, in the order tried: the first is what every package installs, the second what comes with headers.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// A version of NCCL.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(c_int);

impl Version {
    /// The oldest that has every function used here: `ncclMemAlloc` and `ncclCommRegister` came with it.
    pub const NEEDED: Self = Self::new(2, 19, 1);

    /// `major.minor.patch`, of 2.9 or later: those before count otherwise.
    pub const fn new(major: u16, minor: u16, patch: u16) -> Self {
        Self(major as c_int * 10_000 + minor as c_int * 100 + patch as c_int)
    }

    /// As `ncclGetVersion` counts.
    pub fn code(self) -> c_int {
        self.0
    }

    /// Of what `ncclGetVersion` or [`Version::code`] gave.
    pub fn from_code(code: c_int) -> Self {
        Self(code)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Before 2.9 a thousand was a major version.
        let (major, rest) =
            if self.0 < 10_000 { (self.0 / 1000, self.0 % 1000) } else { (self.0 / 10_000, self.0 % 10_000) };
        write!(f, "{major}.{}.{}", rest / 100, rest % 100)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Declares the table of functions, and how it is filled from a library. All return a code but those that return a text.
macro_rules! symbols {
    ($($field:ident = $symbol:literal: fn($($argument:ty),* $(,)?) -> $result:ty;)+) => {
        /// NCCL's functions, as nccl.h declares them.
        pub(crate) struct Symbols {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result,)+
        }

        impl Symbols {
            /// All functions of `library`, or the name of the first that is missing.
            fn of(library: &libloading::Library) -> Result<Self, &'static str> {
                // SAFETY: the types are those that nccl.h gives these functions, in every version that has them.
                unsafe {
                    Ok(Self {
                        $($field: *library.get(concat!($symbol, "\0")).map_err(|_| $symbol)?,)+
                    })
                }
            }
        }
    };
}

type Comm = sys::ncclComm_t;
type DataType = sys::ncclDataType_t;
type Op = sys::ncclRedOp_t;
type RawStream = sys::cudaStream_t;

symbols! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId": fn(*mut sys::ncclUniqueId) -> c_int;
    get_error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    get_last_error = "ncclGetLastError": fn(Comm) -> *const c_char;
    init_rank_config = "ncclCommInitRankConfig": fn(*mut Comm, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> c_int;
    split = "ncclCommSplit": fn(Comm, c_int, c_int, *mut Comm, *mut sys::ncclConfig_t) -> c_int;
    finalize = "ncclCommFinalize": fn(Comm) -> c_int;
    destroy = "ncclCommDestroy": fn(Comm) -> c_int;
    abort = "ncclCommAbort": fn(Comm) -> c_int;
    get_async_error = "ncclCommGetAsyncError": fn(Comm, *mut c_int) -> c_int;
    count = "ncclCommCount": fn(Comm, *mut c_int) -> c_int;
    user_rank = "ncclCommUserRank": fn(Comm, *mut c_int) -> c_int;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
    send = "ncclSend": fn(*const c_void, usize, DataType, c_int, Comm, RawStream) -> c_int;
    recv = "ncclRecv": fn(*mut c_void, usize, DataType, c_int, Comm, RawStream) -> c_int;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, DataType, Op, Comm, RawStream) -> c_int;
    reduce_scatter = "ncclReduceScatter": fn(*const c_void, *mut c_void, usize, DataType, Op, Comm, RawStream) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, DataType, Comm, RawStream) -> c_int;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, DataType, c_int, Comm, RawStream) -> c_int;
    mem_alloc = "ncclMemAlloc": fn(*mut *mut c_void, usize) -> c_int;
    mem_free = "ncclMemFree": fn(*mut c_void) -> c_int;
    register = "ncclCommRegister": fn(Comm, *mut c_void, usize, *mut *mut c_void) -> c_int;
    deregister = "ncclCommDeregister": fn(Comm, *mut c_void) -> c_int;
}

/// The loaded library. Clones are the same; it stays loaded until the process ends, since NCCL has threads of its own.
#[derive(Clone)]
pub struct Nccl(Arc<Loaded>);

struct Loaded {
    symbols: Symbols,
    version: Version,
    path: PathBuf,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl").field("version", &self.0.version).field("path", &self.0.path).finish_non_exhaustive()
    }
}

impl Nccl {
    /// Finds the library where the system's loader looks: `LD_LIBRARY_PATH`, then the usual folders.
    ///
    /// # Errors
    /// See [`LoadError`]. Nothing of the library has been called then but its version.
    pub fn load() -> Result<Self, LoadError> {
        Self::load_first_of(&NAMES)
    }

    /// As [`Nccl::load`], from one file or name.
    ///
    /// # Errors
    /// As there.
    pub fn load_from(path: impl AsRef<OsStr>) -> Result<Self, LoadError> {
        Self::load_first_of(&[path])
    }

    fn load_first_of(names: &[impl AsRef<OsStr>]) -> Result<Self, LoadError> {
        let needed = Version::NEEDED;
        let mut refusals = Vec::new();
        for name in names {
            let path = PathBuf::from(name.as_ref());
            // SAFETY: NCCL's initialisers set up its own state and call nothing of ours.
            let library = match unsafe { libloading::Library::new(&path) } {
                // Never closed: NCCL's threads and communicators may outlive every value of this crate.
                Ok(library) => ManuallyDrop::new(library),
                Err(error) => {
                    refusals.push(error.source().map_or_else(|| error.to_string(), ToString::to_string));
                    continue;
                }
            };
            let symbols = Symbols::of(&library);
            let symbols = symbols.map_err(|symbol| LoadError::NoSymbol { library: path.clone(), symbol, needed })?;
            return Self::of(symbols, path);
        }
        Err(LoadError::NotFound { refusals, needed })
    }

    /// Over a table of functions, if its version will do.
    pub(crate) fn of(symbols: Symbols, path: PathBuf) -> Result<Self, LoadError> {
        let mut code = 0;
        // SAFETY: the pointer is to a live number.
        let answer = Code::new(unsafe { (symbols.get_version)(&raw mut code) });
        if answer != Code::SUCCESS {
            return Err(LoadError::NoVersion { library: path, code: answer });
        }
        let (found, needed) = (Version(code), Version::NEEDED);
        if found < needed {
            return Err(LoadError::TooOld { library: path, found, needed });
        }
        Ok(Self(Arc::new(Loaded { symbols, version: found, path })))
    }

    /// The library's version. All ranks of a communicator must have the same.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// The file, as it was asked for.
    pub fn path(&self) -> &std::path::Path {
        &self.0.path
    }

    /// A new id. Opens a listening socket in this process, at which the ranks meet; its network interface is chosen by NCCL.
    ///
    /// # Errors
    /// NCCL's: no network interface, for example.
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut raw = sys::ncclUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: the pointer is to a live id.
        let code = unsafe { (self.symbols().get_unique_id)(&raw mut raw) };
        self.done("ncclGetUniqueId", code, std::ptr::null_mut())?;
        Ok(UniqueId::from_raw(raw))
    }

    pub(crate) fn symbols(&self) -> &Symbols {
        &self.0.symbols
    }

    /// What a code means; `comm` may be null.
    pub(crate) fn done(&self, call: &'static str, code: c_int, comm: Comm) -> Result<(), Error> {
        match Code::new(code) {
            Code::SUCCESS => Ok(()),
            code => Err(self.error(call, code, comm)),
        }
    }

    pub(crate) fn error(&self, call: &'static str, code: Code, comm: Comm) -> Error {
        // SAFETY: NCCL answers any code with a text of its own that is never freed.
        let text = unsafe { text_at((self.symbols().get_error_string)(code.number())) };
        // SAFETY: the communicator is null or alive, as its owner holds it locked; the text is NCCL's own and copied at once.
        let last = unsafe { text_at((self.symbols().get_last_error)(comm)) };
        Error::Nccl { call, code, text, last: last.trim().to_owned() }
    }
}

/// The text at `at`; empty where there is none.
///
/// # Safety
/// `at` is null or a text that ends in a zero.
unsafe fn text_at(at: *const c_char) -> String {
    if at.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    #[test]
    fn a_library_that_is_not_there_is_named_with_the_mend() {
        let error = Nccl::load_first_of(&["libnccl-none.so.2", "libnccl-none.so"]).unwrap_err().to_string();
        assert!(error.starts_with("no NCCL: libnccl-none.so.2: "), "{error}");
        assert!(error.contains("; libnccl-none.so: "), "{error}");
        assert!(
            error.ends_with("install NCCL 2.19.1 or later, or put the folder of its libnccl.so.2 on LD_LIBRARY_PATH")
        );
    }

    #[test]
    fn a_library_without_a_function_is_refused_before_any_is_called() {
        // The C library is on every machine, and no NCCL.
        let error = Nccl::load_from("libc.so.6").unwrap_err();
        assert!(matches!(&error, LoadError::NoSymbol { symbol: "ncclGetVersion", .. }), "{error}");
    }

    #[test]
    fn an_installed_library_has_every_function() {
        match Nccl::load() {
            Ok(nccl) => println!("{nccl:?}"),
            Err(error @ LoadError::NotFound { .. }) => println!("notice: no NCCL was tried: {error}"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn an_old_library_is_refused() {
        let error = fake::library(21_805).unwrap_err().to_string();
        assert_eq!(error, "fake is NCCL 2.18.5: 2.19.1 or later is needed");
        assert_eq!(Version::from_code(2708).to_string(), "2.7.8");
        assert_eq!(fake::library(22_803).unwrap().version(), Version::new(2, 28, 3));
    }
}
