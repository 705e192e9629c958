//! The gRPC contract between the workers of a job and its coordinator.
//!
//! Owns the messages and the generated client and server stubs of `coordination.proto`, where they are documented. It holds no
//! behaviour: what the messages do to a job is decided in `moe_runtime::coordination`.
#![forbid(unsafe_code)]

/// Version 1 of the contract: package `moe.coordination.v1`.
pub mod v1 {
    // Generated from the .proto, whose comments become the documentation; its writers, not these lints, decide what has one.
    #![allow(missing_docs, clippy::all, unreachable_pub)]
    tonic::include_proto!("moe.coordination.v1");
}

/// The contract as an encoded `google.protobuf.FileDescriptorSet`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/coordination.bin"));

#[cfg(test)]
mod tests {
    use prost::Message;

    #[test]
    fn the_descriptor_set_holds_the_service_under_its_versioned_name() {
        let name = <crate::v1::coordinator_server::CoordinatorServer<()> as tonic::server::NamedService>::NAME;
        assert_eq!(name, "moe.coordination.v1.Coordinator");
        let set = super::FILE_DESCRIPTOR_SET;
        assert!(set.windows(b"moe.coordination.v1".len()).any(|window| window == b"moe.coordination.v1"));
    }

    #[test]
    fn an_abort_without_a_culprit_is_told_apart_from_rank_zero() {
        use crate::v1::Abort;
        let blamed = Abort { culprit: Some(0), reason: String::new() };
        let unblamed = Abort { culprit: None, reason: String::new() };
        assert_eq!(Abort::decode(blamed.encode_to_vec().as_slice()).unwrap().culprit, Some(0));
        assert_eq!(Abort::decode(unblamed.encode_to_vec().as_slice()).unwrap().culprit, None);
    }
}
