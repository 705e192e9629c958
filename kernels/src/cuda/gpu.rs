//! One GPU of this process: its driver context, the compiled kernels, what went wrong.
//!
//! Owns the probing of driver and device, so that a binary starts where neither is and says what is missing.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::blas::Blas;
use super::launch::Grid;
use crate::DeviceError;

/// A compiled source file of `kernels/cuda`.
pub(super) struct Image {
    /// Whether its kernels use instructions that only Hopper has.
    hopper: bool,
    bytes: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The oldest driver interface that the kernels' compiler writes for: CUDA 13.0, as the driver counts.
const DRIVER_NEEDED: i32 = 13000;
/// The oldest compute capability that there are kernels for.
const CAPABILITY_NEEDED: (i32, i32) = (8, 0);
/// What a kernel gets without asking for more.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

/// Why a GPU cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// libcuda is not on this machine.
    #[error("no NVIDIA driver: libcuda.so.1 was not found; install the driver, or use --device cpu")]
    NoDriver,
    /// The driver does not know the CUDA version that the kernels are compiled with.
    #[error(
        "the NVIDIA driver is too old: it knows CUDA {}.{}, this program needs 13.0 (driver 580 or later)",
        found / 1000, found % 1000 / 10
    )]
    DriverTooOld {
        /// What the driver knows, as 1000 · major + 10 · minor.
        found: i32,
    },
    /// The driver sees no GPU.
    #[error("the NVIDIA driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")]
    NoDevice,
    /// There are fewer GPUs.
    #[error(
        "there is no GPU {ordinal}: this process sees {count}, numbered from 0; start at most as many ranks on a machine as it has GPUs"
    )]
    NoSuchDevice {
        /// Asked for.
        ordinal: usize,
        /// Seen.
        count: usize,
    },
    /// The kernels are not compiled for such a GPU.
    #[error("GPU {ordinal} ({name}) has compute capability {}.{}; kernels are compiled for {}.{} and later", found.0, found.1, CAPABILITY_NEEDED.0, CAPABILITY_NEEDED.1)]
    Unsupported {
        /// Asked for.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Its capability.
        found: (i32, i32),
    },
    /// cuBLASLt is not on this machine.
    #[error(
        "libcublasLt.so.13 (or .12) was not found: install CUDA's cuBLAS, or put its folder on LD_LIBRARY_PATH; or use --device cpu"
    )]
    NoCublas,
    /// cuBLASLt is there but does not start.
    #[error("libcublasLt could not be started: {0:?}")]
    Cublas(cudarc::cublaslt::result::CublasError),
    /// The driver refused.
    #[error("the NVIDIA driver failed: {}", explained(*.0))]
    Driver(DriverError),
}

/// What a GPU is.
#[derive(Debug, Clone)]
pub struct Facts {
    /// As the driver names it.
    pub name: String,
    /// Tells it from every other GPU, whatever numbers processes give them.
    pub uuid: [u8; 16],
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// The most shared memory that a block can have, in bytes.
    pub shared_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
}

impl Facts {
    /// Whether the Hopper kernels run: they use instructions that only 9.0 has.
    pub fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }
}

/// An open GPU.
pub(super) struct Gpu {
    /// Before the context, so that it is closed while there still is one.
    pub(super) blas: Blas,
    pub(super) context: Arc<CudaContext>,
    pub(super) facts: Facts,
    modules: Vec<Module>,
    /// The kernels of all modules by their names.
    kernels: Mutex<HashMap<String, Kernel>>,
    fault: Mutex<Option<DeviceError>>,
}

/// A loaded image.
struct Module(sys::CUmodule);

impl Module {
    /// All kernels of the image. Asking for a name that an image lacks would be a failed call, which tools that watch the driver report.
    fn kernels(&self) -> Result<Vec<(String, Kernel)>, DriverError> {
        let mut count = 0;
        // SAFETY: the module is loaded; the driver writes one number.
        unsafe { sys::cuModuleGetFunctionCount(&mut count, self.0) }.result()?;
        let mut functions: Vec<sys::CUfunction> = vec![ptr::null_mut(); count as usize];
        // SAFETY: the driver writes at most `count` handles, for which there is room.
        unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, self.0) }.result()?;
        let named = |function| {
            let mut name = ptr::null();
            // SAFETY: the function is of a loaded module; the driver writes the address of a text.
            unsafe { sys::cuFuncGetName(&mut name, function) }.result()?;
            // SAFETY: the text ends in a zero, and stays while the module is loaded; it is copied.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            Ok((name, Kernel { function, shared_bytes: PLAIN_SHARED_BYTES }))
        };
        functions.into_iter().map(named).collect()
    }
}

/// A kernel of a loaded image, and the dynamic shared memory it is allowed.
#[derive(Clone, Copy)]
struct Kernel {
    function: sys::CUfunction,
    shared_bytes: u32,
}

// SAFETY: handles of the driver may be used from any thread that has bound the context, which `Gpu::bound` and `Gpu::launch` do first; a module is
// unloaded only with its `Gpu`.
unsafe impl Send for Module {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Module {}
// SAFETY: as above: a kernel lives as long as its module.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// GPUs that this process may see, at least one. Opens none.
///
/// # Errors
/// No driver, one that is too old or fails, no GPU.
pub fn gpu_count() -> Result<usize, OpenError> {
    // SAFETY: it only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpenError::NoDriver);
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(OpenError::NoDevice),
        other => other.map_err(OpenError::Driver)?,
    }
    let mut found = 0;
    // SAFETY: the driver writes one number.
    unsafe { sys::cuDriverGetVersion(&mut found) }.result().map_err(OpenError::Driver)?;
    if found < DRIVER_NEEDED {
        return Err(OpenError::DriverTooOld { found });
    }
    match CudaContext::device_count().map_err(OpenError::Driver)? {
        0 => Err(OpenError::NoDevice),
        count => Ok(count as usize),
    }
}

impl Gpu {
    pub(super) fn open(ordinal: usize) -> Result<Self, OpenError> {
        let count = gpu_count()?;
        if ordinal >= count {
            return Err(OpenError::NoSuchDevice { ordinal, count });
        }
        Self::with_context(ordinal, CudaContext::new(ordinal).map_err(OpenError::Driver)?)
    }

    fn with_context(ordinal: usize, context: Arc<CudaContext>) -> Result<Self, OpenError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let facts = || {
            Ok(Facts {
                name: context.name()?,
                uuid: context.uuid()?.bytes.map(|byte| byte as u8),
                capability: context.compute_capability()?,
                multiprocessors: context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
                shared_bytes: context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                    as usize,
                memory_bytes: context.total_mem()?,
            })
        };
        let facts = facts().map_err(OpenError::Driver)?;
        if facts.capability < CAPABILITY_NEEDED {
            return Err(OpenError::Unsupported { ordinal, name: facts.name, found: facts.capability });
        }
        let blas = Blas::open(facts.is_hopper())?;
        // Files for another architecture are not loaded: their kernels are only asked for where they run.
        let runs = |image: &&Image| facts.is_hopper() || !image.hopper;
        let load = |image: &Image| {
            // SAFETY: the image is a whole fat binary that nvcc wrote; the driver reads its own length from it.
            unsafe { result::module::load_data(image.bytes.as_ptr().cast()) }.map(Module)
        };
        let modules: Vec<_> =
            IMAGES.iter().filter(runs).map(load).collect::<Result<_, _>>().map_err(OpenError::Driver)?;
        let mut kernels = HashMap::new();
        for module in &modules {
            kernels.extend(module.kernels().map_err(OpenError::Driver)?);
        }
        Ok(Self { blas, context, facts, modules, kernels: Mutex::new(kernels), fault: Mutex::default() })
    }

    pub(super) fn new_stream(&self) -> Result<Arc<CudaStream>, DriverError> {
        self.context.new_stream()
    }

    /// A stream whose kernels go before those of others that wait for the same multiprocessors.
    pub(super) fn new_urgent_stream(&self) -> Result<Arc<CudaStream>, DriverError> {
        self.context.bind_to_thread()?;
        let (_, most_urgent) = result::stream::get_priority_range()?;
        self.context.new_stream_with_priority(most_urgent)
    }

    /// Runs a driver call with the context bound to this thread; what fails is remembered.
    pub(super) fn bound(&self, operation: &str, call: impl FnOnce() -> Result<(), DriverError>) {
        if let Err(error) = self.context.bind_to_thread().and_then(|()| call()) {
            self.remember(operation, error);
        }
    }

    /// Issues a kernel.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameter types, and addresses among them to what the kernel touches.
    pub(super) unsafe fn launch(
        &self,
        name: &'static str,
        grid: Grid,
        stream: &CudaStream,
        arguments: &mut [*mut c_void],
    ) {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return;
        }
        let Some(function) = self.kernel(name, grid.shared_bytes) else { return };
        self.bound(name, || {
            let early = grid.early && self.facts.is_hopper();
            let mut attribute = sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            };
            let config = sys::CUlaunchConfig {
                gridDimX: grid.blocks.0,
                gridDimY: grid.blocks.1,
                gridDimZ: grid.blocks.2,
                blockDimX: grid.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: grid.shared_bytes,
                hStream: stream.cu_stream(),
                attrs: &mut attribute,
                numAttrs: early.into(),
            };
            // SAFETY: the caller's promise; function and stream are this context's, and the configuration lives until the call is over.
            unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) }.result()
        });
    }

    /// The kernel `name`, allowed to have `shared_bytes`.
    fn kernel(&self, name: &str, shared_bytes: u32) -> Option<sys::CUfunction> {
        let mut kernels = locked(&self.kernels);
        let Some(kernel) = kernels.get_mut(name) else {
            self.remember(name, DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND));
            return None;
        };
        if shared_bytes > kernel.shared_bytes {
            use sys::CUfunction_attribute_enum as Attribute;
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let function = kernel.function;
            // SAFETY: the function is a loaded module's.
            let raise =
                || unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) };
            self.bound(name, raise);
            kernel.shared_bytes = shared_bytes;
        }
        Some(kernel.function)
    }

    /// Keeps the first fault.
    pub(super) fn remember(&self, operation: &str, error: DriverError) {
        self.keep(self.fault(operation, error));
    }

    /// As [`Gpu::remember`], for a fault in its final form.
    pub(super) fn keep(&self, fault: DeviceError) {
        locked(&self.fault).get_or_insert(fault);
    }

    /// The first fault so far.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        locked(&self.fault).clone().map_or(Ok(()), Err)
    }

    pub(super) fn fault(&self, operation: &str, error: DriverError) -> DeviceError {
        let reason = explained(error);
        DeviceError::Fault { device: self.facts.name.clone(), operation: operation.into(), reason }
    }

    pub(super) fn out_of_memory(&self, bytes: usize, what: &str) -> DeviceError {
        let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
        let device = format!("{} ({} MiB free of {})", self.facts.name, free >> 20, self.facts.memory_bytes >> 20);
        DeviceError::OutOfMemory { device, bytes, what: what.into() }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        for Module(module) in &self.modules {
            // SAFETY: nobody launches any more: every queue and buffer holds this `Gpu`. A failure here has nobody to hear it.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

/// The driver's own words.
fn explained(error: DriverError) -> String {
    let text = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("unknown error");
    format!("{text} ({:?})", error.0)
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
