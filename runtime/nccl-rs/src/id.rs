//! The unique id: what ranks must agree on before they can talk.

use std::ffi::c_char;
use std::fmt;

use cudarc::nccl::sys;

use crate::Error;

/// Names one communicator to be: made by one process ([`crate::Nccl::unique_id`]), given to all, used once. It holds the address at
/// which its maker listens, so that process must live until all have connected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; Self::BYTES]);

impl UniqueId {
    /// Bytes of an id.
    pub const BYTES: usize = 128;

    /// The bytes, to be sent to the other ranks.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    pub(crate) fn from_raw(raw: sys::ncclUniqueId) -> Self {
        Self(raw.internal.map(|byte| byte as u8))
    }

    pub(crate) fn to_raw(self) -> sys::ncclUniqueId {
        sys::ncclUniqueId { internal: self.0.map(|byte| byte as c_char) }
    }
}

impl From<[u8; Self::BYTES]> for UniqueId {
    fn from(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<&[u8]> for UniqueId {
    type Error = Error;

    fn try_from(bytes: &[u8]) -> Result<Self, Error> {
        let whole = <[u8; Self::BYTES]>::try_from(bytes);
        whole.map(Self).map_err(|_| Error::IdLength { found: bytes.len(), due: Self::BYTES })
    }
}

impl fmt::Debug for UniqueId {
    /// The first bytes, enough to tell two apart: the rest is an address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(")?;
        for byte in &self.0[..8] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_the_way_through_bytes() {
        let bytes = std::array::from_fn(|index| (index * 37 % 256) as u8);
        let id = UniqueId::from(bytes);
        assert_eq!(UniqueId::try_from(&id.as_bytes()[..]).unwrap(), id);
        assert_eq!(UniqueId::from_raw(id.to_raw()), id);
        assert_eq!(format!("{id:?}"), "UniqueId(00254a6f94b9de03…)");
    }

    #[test]
    fn bytes_of_another_length_are_no_id() {
        let error = UniqueId::try_from(&[0; 127][..]).unwrap_err();
        assert_eq!(error.to_string(), "an NCCL unique id has 128 bytes, not 127");
    }
}
