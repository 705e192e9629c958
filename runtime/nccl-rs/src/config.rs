//! How a communicator is set up.

use std::ffi::{CString, c_int};
use std::ptr;

use cudarc::nccl::sys;

use crate::Version;

/// Marks a setting of `ncclConfig_t` that NCCL chooses itself (NCCL_CONFIG_UNDEF_INT).
const UNSET: c_int = c_int::MIN;
/// Marks a block of memory as an `ncclConfig_t` (NCCL_API_MAGIC).
const MAGIC: u32 = 0xcafe_beef;
/// The NCCL whose `ncclConfig_t` cudarc describes; an older library reads as much of it as it knows.
const DESCRIBED: Version = Version::new(2, 30, 0);

/// Settings of one communicator; what is `None` NCCL decides.
#[derive(Debug, Clone, Default)]
pub struct CommConfig {
    /// The fewest thread blocks of a collective.
    pub min_ctas: Option<u16>,
    /// The most thread blocks of a collective: what is left of the GPU's multiprocessors computes.
    pub max_ctas: Option<u16>,
    /// Thread blocks of a cluster, on GPUs that have clusters.
    pub cga_cluster_size: Option<u16>,
    /// The name of the network plugin's or NCCL's own transport, as "Socket" or "IB". A name with a zero byte is not used.
    pub net_name: Option<String>,
}

/// NCCL's form of a [`CommConfig`], with the text it points to.
pub(crate) struct RawConfig {
    pub(crate) raw: sys::ncclConfig_t,
    _net_name: Option<CString>,
}

/// What one of the two handles of a communicator is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Connects, splits and aborts: its calls return before they are done, so that each wait has a deadline. What is split from it shares
    /// its resources, and with them the flags that end all waits.
    Control,
    /// Issues collectives, on the thread that calls. A group of a non-blocking communicator is launched by a thread that NCCL starts for
    /// each, and the start of a thread on another core takes longer than many an exchange.
    Issue,
}

impl CommConfig {
    /// For a library of version `version`.
    pub(crate) fn to_raw(&self, version: Version, role: Role) -> RawConfig {
        let set = |value: Option<u16>| value.map_or(UNSET, c_int::from);
        let net_name = self.net_name.as_deref().and_then(|name| CString::new(name).ok());
        let raw = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: MAGIC,
            version: version.min(DESCRIBED).code() as u32,
            blocking: c_int::from(role == Role::Issue),
            cgaClusterSize: set(self.cga_cluster_size),
            minCTAs: set(self.min_ctas),
            maxCTAs: set(self.max_ctas),
            netName: net_name.as_ref().map_or(ptr::null(), |name| name.as_ptr()),
            splitShare: c_int::from(role == Role::Control),
            trafficClass: UNSET,
            commName: ptr::null(),
            collnetEnable: UNSET,
            CTAPolicy: UNSET,
            shrinkShare: UNSET,
            nvlsCTAs: UNSET,
            nChannelsPerNetPeer: UNSET,
            nvlinkCentricSched: UNSET,
            graphUsageMode: UNSET,
            numRmaCtx: UNSET,
            maxP2pPeers: UNSET,
        };
        RawConfig { raw, _net_name: net_name }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_set_is_left_to_nccl() {
        let config = CommConfig { max_ctas: Some(16), net_name: Some("Socket".into()), ..CommConfig::default() };
        let RawConfig { raw, .. } = config.to_raw(Version::new(2, 28, 3), Role::Control);
        assert_eq!((raw.blocking, raw.splitShare, raw.minCTAs, raw.maxCTAs), (0, 1, UNSET, 16));
        assert_eq!(raw.version, 22803);
        assert!(!raw.netName.is_null() && raw.commName.is_null());
    }

    #[test]
    fn a_later_library_is_told_which_settings_are_meant() {
        let RawConfig { raw, .. } = CommConfig::default().to_raw(Version::new(2, 99, 0), Role::Issue);
        assert_eq!((raw.version, raw.blocking, raw.splitShare), (DESCRIBED.code() as u32, 1, 0));
    }
}
