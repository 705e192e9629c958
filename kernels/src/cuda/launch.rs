//! Launching a kernel by its name.

use super::gpu::Facts;

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Blocks in x, y, z.
    pub blocks: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block; above 48 KiB the kernel's limit is raised at its first launch.
    pub shared_bytes: u32,
    /// Whether blocks may take their places while the kernel before ends, where the GPU can do that. The kernel waits for it by itself
    /// (`after_the_kernel_before` in cuda/common.cuh).
    pub early: bool,
}

impl Grid {
    /// One-dimensional.
    pub(super) fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: (blocks as u32, 1, 1), threads, shared_bytes: 0, early: false }
    }

    /// With dynamic shared memory.
    pub(super) fn shared(self, bytes: usize) -> Self {
        Self { shared_bytes: bytes as u32, ..self }
    }

    /// See [`Grid::early`].
    pub(super) fn early(self) -> Self {
        Self { early: true, ..self }
    }

    /// Enough blocks for `n` elements, but no more than keep the GPU full: the kernel strides over the rest.
    pub(super) fn cover(n: usize, threads: u32, facts: &Facts) -> Self {
        let full = facts.multiprocessors * (2048 / threads as usize);
        Self::new(n.div_ceil(threads as usize).clamp(1, full), threads)
    }
}

/// `launch!(queue, "name", grid; arguments…)`: issues a kernel. Arguments are passed as they are: addresses u64, i32, i64, f32, f64,
/// or a tensor map; their types must be the kernel's.
macro_rules! launch {
    ($queue:expr, $name:expr, $grid:expr; $($argument:expr),+ $(,)?) => {{
        let mut kept = ($($argument,)+);
        let mut pointers = $crate::cuda::launch::Arguments::pointers(&mut kept);
        // SAFETY: the pointers are those of `kept`, which lives until the launch has copied the arguments. That their number and
        // types are the kernel's, and that the buffers behind the addresses hold what the kernel touches, is what each op's checks
        // and the tests under compute-sanitizer are for.
        unsafe { $queue.gpu.launch($name, $grid, &$queue.stream, pointers.as_mut()) }
    }};
}

pub(super) use launch;

/// Kernel arguments as the driver takes them.
pub(super) trait Arguments {
    /// The addresses of the arguments.
    type Pointers: AsMut<[*mut std::ffi::c_void]>;
    /// Where the arguments lie.
    fn pointers(&mut self) -> Self::Pointers;
}

macro_rules! arguments {
    ($($field:ident)+) => {
        impl<$($field),+> Arguments for ($($field,)+) {
            type Pointers = [*mut std::ffi::c_void; [$(stringify!($field)),+].len()];
            #[allow(non_snake_case)]
            fn pointers(&mut self) -> Self::Pointers {
                let ($($field,)+) = self;
                [$(std::ptr::from_mut($field).cast()),+]
            }
        }
    };
}
arguments!(A);
arguments!(A B);
arguments!(A B C);
arguments!(A B C D);
arguments!(A B C D E);
arguments!(A B C D E F);
arguments!(A B C D E F G);
arguments!(A B C D E F G H);
arguments!(A B C D E F G H I);
arguments!(A B C D E F G H I J);
arguments!(A B C D E F G H I J K);
arguments!(A B C D E F G H I J K L);
arguments!(A B C D E F G H I J K L M);
arguments!(A B C D E F G H I J K L M N);
arguments!(A B C D E F G H I J K L M N O);
arguments!(A B C D E F G H I J K L M N O P);
arguments!(A B C D E F G H I J K L M N O P Q);
arguments!(A B C D E F G H I J K L M N O P Q R);
