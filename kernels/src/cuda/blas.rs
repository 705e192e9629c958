//! Dense matrix products through cuBLASLt.
//!
//! Owns the library's handle, and for each form of product met so far its descriptors and the algorithm the library's heuristic chose:
//! asked once, so every later run takes the same one. Sums are the same bits in every run: where the depth is split, the parts are
//! added in f32 by a kernel of their own, never by atomics. bf16 and f32 are both accumulated in f32, and f32 is never cut to TF32.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

use super::gpu::{OpenError, locked};
use super::{Cuda, CudaAct};
use crate::DeviceError;

/// What NVIDIA advises for Hopper, whose kernels split more; and for others.
const WORKSPACE_BYTES: (usize, usize) = (64 << 20, 32 << 20);
/// More than this the library does not ask of an address.
const ALIGNMENT: u64 = 256;

/// A number type of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Number {
    Bf16,
    F32,
}

impl Number {
    /// The activation type's.
    pub(super) fn of<A: CudaAct>() -> Self {
        if A::HOLDS_F32 { Self::F32 } else { Self::Bf16 }
    }

    fn code(self) -> sys::cudaDataType {
        match self {
            Self::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Self::F32 => sys::cudaDataType::CUDA_R_32F,
        }
    }
}

/// `out (+)= a · b` as cuBLAS has it, by columns: `out` has `rows` and `columns`, and `depth` is summed over. A row-major tensor
/// `[r, c]` is its matrix of c rows and r columns, so products are written with their operands turned round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    /// Whether `a` is stored turned, `depth` × `rows`.
    pub a_turned: bool,
    /// Whether `b` is stored turned, `columns` × `depth`.
    pub b_turned: bool,
    pub input: Number,
    pub output: Number,
    /// Whether the product is added to `out`.
    pub add: bool,
}

/// A product and how its addresses are aligned, which some algorithms depend on.
type Form = (Product, [u32; 3]);

#[derive(Clone, Copy)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace_bytes: usize,
    plans: Mutex<HashMap<Form, Result<Plan, CublasError>>>,
}

// SAFETY: a cuBLASLt handle may be used from several threads at once; descriptors are not changed after they are made, and made under
// the lock of `plans`.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    /// Starts the library in the context that this thread has bound.
    pub(super) fn open(hopper: bool) -> Result<Self, OpenError> {
        // SAFETY: it only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpenError::NoCublas);
        }
        let handle = result::create_handle().map_err(OpenError::Cublas)?;
        let workspace_bytes = if hopper { WORKSPACE_BYTES.0 } else { WORKSPACE_BYTES.1 };
        Ok(Self { handle, workspace_bytes, plans: Mutex::default() })
    }

    fn plan(&self, form: Form) -> Result<Plan, CublasError> {
        *locked(&self.plans).entry(form).or_insert_with(|| self.make(form))
    }

    fn make(&self, (product, alignment): Form) -> Result<Plan, CublasError> {
        let Product { rows, columns, depth, .. } = product;
        let layout = |number: Number, rows: usize, columns: usize| {
            result::create_matrix_layout(number.code(), rows as u64, columns as u64, rows as i64)
        };
        let (a_rows, a_columns) = if product.a_turned { (depth, rows) } else { (rows, depth) };
        let (b_rows, b_columns) = if product.b_turned { (columns, depth) } else { (depth, columns) };
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)?;
        let plan = Plan {
            product: description,
            a: layout(product.input, a_rows, a_columns)?,
            b: layout(product.input, b_rows, b_columns)?,
            out: layout(product.output, rows, columns)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let turns = [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, product.a_turned),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, product.b_turned),
        ];
        for (attribute, turned) in turns {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = i32::from(turned);
            let at = (&raw const operation).cast::<c_void>();
            // SAFETY: the description was made above, and the attribute is an i32.
            unsafe { result::set_matmul_desc_attribute(description, attribute, at, size_of::<i32>()) }?;
        }
        let algorithm = self.choose(plan, alignment)?;
        Ok(Plan { algorithm, ..plan })
    }

    /// The library's first choice among the algorithms whose sums have a fixed order.
    fn choose(&self, plan: Plan, alignment: [u32; 3]) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref()?;
        let workspace = self.workspace_bytes as u64;
        let at = (&raw const workspace).cast::<c_void>();
        let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the preference was made above, and the attribute is a u64.
        let mut done = unsafe { result::set_matmul_pref_attribute(preference, attribute, at, size_of::<u64>()) };
        // The depth is not split, or its parts are added in f32: not in the output's type, nor in the output itself.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let [a, b, out] = alignment;
        let numbers = [
            (Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ];
        for (attribute, number) in numbers {
            let at = (&raw const number).cast::<c_void>();
            // SAFETY: the preference was made above, and the attribute is a u32.
            done = done.and(unsafe { result::set_matmul_pref_attribute(preference, attribute, at, size_of::<u32>()) });
        }
        let Plan { product, a, b, out, .. } = plan;
        let chosen = done.and_then(|()| {
            // SAFETY: all were made by this library and live.
            unsafe { result::get_matmul_algo_heuristic(self.handle, product, a, b, out, out, preference) }
        });
        // SAFETY: nobody else has the preference.
        unsafe { result::destroy_matmul_pref(preference) }?;
        Ok(chosen?.algo)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        for plan in locked(&self.plans).values().flatten() {
            for layout in [plan.a, plan.b, plan.out] {
                // SAFETY: the plan owns it, and nobody multiplies any more. A failure here has nobody to hear it.
                let _ = unsafe { result::destroy_matrix_layout(layout) };
            }
            // SAFETY: as above.
            let _ = unsafe { result::destroy_matmul_desc(plan.product) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl<A: CudaAct> Cuda<A> {
    /// Issues `out (+)= a · b`. The operands are as large as `product` says; nothing is done where the output has no element or, in a
    /// sum, the depth is 0.
    pub(super) fn multiply(&self, product: Product, a: u64, b: u64, out: u64) {
        if product.rows == 0 || product.columns == 0 || (product.add && product.depth == 0) {
            return;
        }
        assert!(product.depth > 0, "a product without depth: {product:?}");
        let blas = &self.gpu.blas;
        let Some(workspace) = self.workspace(blas.workspace_bytes) else { return };
        let alignment =
            [a, b, out].map(|address| (1 << address.trailing_zeros().min(ALIGNMENT.trailing_zeros())) as u32);
        let one = 1.0_f32;
        let beta = if product.add { 1.0_f32 } else { 0.0 };
        let call = || {
            let plan = blas.plan((product, alignment))?;
            // SAFETY: the plan's descriptors live as long as the library; operands and output are live memory of the sizes that the
            // layouts say (asserted by each op), the workspace is this queue's own; the scalars are read before the call returns.
            unsafe {
                result::matmul(
                    blas.handle,
                    plan.product,
                    (&raw const one).cast(),
                    (&raw const beta).cast(),
                    a as *const c_void,
                    plan.a,
                    b as *const c_void,
                    plan.b,
                    out as *const c_void,
                    plan.out,
                    out as *mut c_void,
                    plan.out,
                    &raw const plan.algorithm,
                    workspace.at(0) as *mut c_void,
                    blas.workspace_bytes,
                    self.stream.cu_stream().cast(),
                )
            }
        };
        self.gpu.bound("cublasLtMatmul", || {
            if let Err(CublasError(status)) = call() {
                let (device, operation) = (self.gpu.facts.name.clone(), format!("cublasLtMatmul, {product:?}"));
                self.gpu.keep(DeviceError::Fault { device, operation, reason: format!("{status:?}") });
            }
            Ok(())
        });
    }
}
