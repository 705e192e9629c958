//! Device memory that NCCL moves without a copy of its own: allocated by it, or registered with it.

use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::communicator::Shared;
use crate::{Communicator, Error, Nccl};

/// Device memory of NCCL's own kind, on the GPU that was current when it was made. Its content is undefined at first. Freed when it is
/// dropped: by then no stream may still use it.
pub struct Memory {
    nccl: Nccl,
    at: *mut c_void,
    bytes: usize,
}

// SAFETY: the value is an address of device memory, which no thread owns; `ncclMemFree` may be called on any.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared reference only tells the address.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` of the current GPU's memory; of none the address is 0.
    ///
    /// # Errors
    /// NCCL's: no memory left, for example.
    pub fn alloc(nccl: &Nccl, bytes: usize) -> Result<Self, Error> {
        let mut at = ptr::null_mut();
        if bytes > 0 {
            // SAFETY: the pointer is to a live address.
            let code = unsafe { (nccl.symbols().mem_alloc)(&raw mut at, bytes) };
            nccl.done("ncclMemAlloc", code, ptr::null_mut())?;
        }
        Ok(Self { nccl: nccl.clone(), at, bytes })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.at as usize as u64
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.at.is_null() {
            // SAFETY: NCCL gave the memory out, and it is freed once. Nobody is left to hear of a failure.
            let _ = unsafe { (self.nccl.symbols().mem_free)(self.at) };
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Keeps device memory registered with a communicator. It keeps the communicator from ending, too.
pub struct Registration {
    shared: Arc<Shared>,
    handle: *mut c_void,
}

// SAFETY: the handle is used under the communicator's lock alone.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Communicator {
    /// Registers memory with this communicator, so that its collectives on it need no copies of NCCL's own. A gain is to be expected
    /// where the same offsets of memory from [`Memory::alloc`] are used on all ranks.
    ///
    /// # Safety
    /// The `bytes` from `address` on are device memory of the communicator's GPU, and stay so until the registration is dropped.
    ///
    /// # Errors
    /// [`Error::Aborted`]; NCCL's own.
    pub unsafe fn register(&self, address: u64, bytes: usize) -> Result<Registration, Error> {
        const CALL: &str = "ncclCommRegister";
        let held = self.shared().hold(CALL)?;
        let mut handle = ptr::null_mut();
        let at = address as usize as *mut c_void;
        // SAFETY: the communicator is held, the memory is what the caller promises, and the pointer is to a live handle.
        let code = unsafe { (held.nccl().symbols().register)(held.comm(), at, bytes, &raw mut handle) };
        held.nccl().done(CALL, code, held.comm())?;
        Ok(Registration { shared: Arc::clone(self.shared()), handle })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let handle = self.handle;
        if handle.is_null() {
            // NCCL registers nothing where it would gain nothing.
            return;
        }
        self.shared.while_alive(|nccl, comm| {
            // SAFETY: the communicator gave the handle out and is alive; it is given back once. Nobody is left to hear of a failure.
            let _ = unsafe { (nccl.symbols().deregister)(comm, handle) };
        });
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registration")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{self, Call};

    #[test]
    fn memory_is_freed_once_and_nothing_is_asked_for_nothing() {
        let nccl = fake::nccl();
        assert_eq!(Memory::alloc(&nccl, 0).unwrap().address(), 0);
        let memory = Memory::alloc(&nccl, 4096).unwrap();
        assert!(memory.address() != 0 && memory.bytes() == 4096);
        drop(memory);
        assert_eq!(fake::calls(), [Call::MemAlloc(4096), Call::MemFree]);
    }

    #[test]
    fn a_registration_is_given_back_unless_the_communicator_is_gone() {
        let communicator = fake::communicator(0, 2);
        // SAFETY: the fake library looks at no memory.
        let register = || unsafe { communicator.register(0x1000, 64) }.unwrap();
        drop(register());
        let late = register();
        communicator.abort_handle().abort().unwrap();
        drop(late);
        assert_eq!(fake::calls(), [Call::Register(64), Call::Deregister, Call::Register(64), Call::Abort, Call::Abort]);
        // SAFETY: as above.
        let refused = unsafe { communicator.register(0x1000, 64) }.unwrap_err();
        assert_eq!(refused.to_string(), "ncclCommRegister: the communicator was aborted");
    }
}
