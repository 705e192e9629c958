//! The dense, attention, loss and optimizer operations of the CPU against naive f64 references.
//!
//! One binary, one module an op family. References are written for reading, in f64 and without any of the code under test;
//! where a backward pass is a page of algebra the reference is a central difference of the forward one instead.

mod attention;
mod elementwise;
mod linear;
mod loss;
mod norm;
mod optimizer;
mod support;
