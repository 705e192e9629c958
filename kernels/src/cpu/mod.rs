//! The CPU implementation: f32, multi-threaded, and the oracle for every other one.
//!
//! Owns memory and the queue, which runs each operation at once; the op families are in the modules beside this one.

mod activation;
mod attention;
mod attention_grad;
mod dense;
mod embedding;
mod expert;
mod gemm;
mod grouped;
mod logits;
mod loss;
mod norm;
mod optimizer;
mod panel;
mod parallel;
mod rotary;
mod routing;
mod rows;
mod shuffle;
mod simd;
#[cfg(test)]
mod testkit;
mod vector;

use std::time::{Duration, Instant};

use crate::{Buffer, Device, DeviceError, Element, View, ViewMut};

/// A CPU queue. Operations run on the calling thread and the rayon pool it is in.
#[derive(Clone, Debug, Default)]
pub struct Cpu;

impl<T: Element> Buffer<T> for Vec<T> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }
}

impl Device for Cpu {
    type Act = f32;
    type Buffer<T: Element> = Vec<T>;
    type Event = ();
    type Stamp = Instant;

    fn describe(&self) -> String {
        format!(
            "CPU, {} thread{}",
            rayon::current_num_threads(),
            if rayon::current_num_threads() == 1 { "" } else { "s" }
        )
    }

    fn fork(&self) -> Self {
        self.clone()
    }

    fn alloc<T: Element>(&self, len: usize, what: &str) -> Result<Vec<T>, DeviceError> {
        let refused = || DeviceError::OutOfMemory { device: "CPU".into(), bytes: len * T::BYTES, what: what.into() };
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| refused())?;
        buffer.resize(len, T::default());
        Ok(buffer)
    }

    fn upload<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) {
        slice_mut(to).copy_from_slice(host);
    }

    fn read_to_host<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<(), DeviceError> {
        host.copy_from_slice(slice(from));
        Ok(())
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) {
        slice_mut(to).copy_from_slice(slice(from));
    }

    fn fill<T: Element>(&self, to: ViewMut<'_, Self, T>, value: T) {
        slice_mut(to).fill(value);
    }

    fn record(&self) {}

    fn wait(&self, (): &()) {}

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn stamp(&self) -> Instant {
        Instant::now()
    }

    fn between(&self, from: &Instant, to: &Instant) -> Duration {
        to.saturating_duration_since(*from)
    }

    fn host_view<T: Element>(view: View<'_, Self, T>) -> Option<&[T]> {
        Some(slice(view))
    }

    fn host_view_mut<T: Element>(view: ViewMut<'_, Self, T>) -> Option<&mut [T]> {
        Some(slice_mut(view))
    }
}

/// The elements of a view.
pub fn slice<T: Element>(view: View<'_, Cpu, T>) -> &[T] {
    let (buffer, offset) = view.parts();
    &buffer[offset..offset + view.len()]
}

/// The elements of a writable view.
pub fn slice_mut<T: Element>(view: ViewMut<'_, Cpu, T>) -> &mut [T] {
    let len = view.len();
    let (buffer, offset) = view.into_parts();
    &mut buffer[offset..offset + len]
}
