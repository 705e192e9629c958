//! Dense layers: linear, activations, RMSNorm, SwiGLU, embedding, residual sums, the shared expert's gate.

use crate::{Device, View, ViewMut};

/// Sizes of `y[m, n] = x[m, k] · w[n, k]ᵀ`: weights are `[out, in]`, as Hugging Face stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmDims {
    /// Rows of x and y.
    pub m: usize,
    /// Columns of y: the output width.
    pub n: usize,
    /// Columns of x: the input width.
    pub k: usize,
}

/// Whether an output is replaced or added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// The output's old content is not read.
    Overwrite,
    /// The result is added to the output.
    Add,
}

/// A function of one number, between two linear layers of a small network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationKind {
    /// max(x, 0). Its slope at 0 is 0.
    Relu,
    /// x · Φ(x) with the normal distribution itself (Hendrycks and Gimpel 2016).
    Gelu,
    /// x · sigmoid(x) (Elfwing et al. 2017).
    Silu,
    /// The hyperbolic tangent.
    Tanh,
}

impl ActivationKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Relu, Self::Gelu, Self::Silu, Self::Tanh];
}

/// How many rows an operation works on: a bound that the host knows and, where only the device knows the number, that number.
pub struct Rows<'a, D: Device> {
    /// No more rows than this; views hold at least so many.
    pub bound: usize,
    /// One element on the device: the rows that count. None: all of `bound`.
    pub count: Option<View<'a, D, i32>>,
}

impl<D: Device> Clone for Rows<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Rows<'_, D> {}

impl<D: Device> Rows<'_, D> {
    /// A number of rows that the host knows.
    pub fn exactly(bound: usize) -> Self {
        Self { bound, count: None }
    }
}

/// Rows to normalise. Row `(t, j)` of `t < tokens`, `j < groups` starts at element `t · token_stride + j · width`: with
/// `groups` = 1 and `token_stride` = `width` it is a plain matrix; with `groups` = heads it normalises heads inside a wider row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormDims {
    /// Tokens.
    pub tokens: usize,
    /// Normalised rows inside one token.
    pub groups: usize,
    /// Elements of one normalised row; also of the weight.
    pub width: usize,
    /// Elements from one token to the next, in x, y and their gradients alike.
    pub token_stride: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// Dense layers and their backward passes. `Act` tensors are in the device's activation type; gradients of parameters are f32
/// and always accumulate.
pub trait DenseOps: Device {
    /// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])`.
    fn linear(
        &self,
        dims: GemmDims,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        bias: Option<View<'_, Self, Self::Act>>,
        y: ViewMut<'_, Self, Self::Act>,
    );
    /// `dx[m, k] (+)= dy[m, n] · w[n, k]`.
    fn linear_grad_input(
        &self,
        dims: GemmDims,
        dy: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        dx: ViewMut<'_, Self, Self::Act>,
        accumulate: Accumulate,
    );
    /// `dw[n, k] += dy[m, n]ᵀ · x[m, k]`.
    fn linear_grad_weight(
        &self,
        dims: GemmDims,
        dy: View<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        dw: ViewMut<'_, Self, f32>,
    );
    /// `db[columns] += Σ_rows dy[rows, columns]`.
    fn bias_grad(&self, rows: usize, columns: usize, dy: View<'_, Self, Self::Act>, db: ViewMut<'_, Self, f32>);

    /// [`DenseOps::linear`] with an f32 result, for small outputs that must not be rounded: router and gate logits.
    fn linear_f32(
        &self,
        dims: GemmDims,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        y: ViewMut<'_, Self, f32>,
    );
    /// `dx[m, k] (+)= dy[m, n] · w[n, k]` with an f32 `dy`.
    fn linear_f32_grad_input(
        &self,
        dims: GemmDims,
        dy: View<'_, Self, f32>,
        w: View<'_, Self, Self::Act>,
        dx: ViewMut<'_, Self, Self::Act>,
        accumulate: Accumulate,
    );
    /// `dw[n, k] += dy[m, n]ᵀ · x[m, k]` with an f32 `dy`.
    fn linear_f32_grad_weight(
        &self,
        dims: GemmDims,
        dy: View<'_, Self, f32>,
        x: View<'_, Self, Self::Act>,
        dw: ViewMut<'_, Self, f32>,
    );
    /// [`DenseOps::linear_f32_grad_weight`] and [`DenseOps::linear_f32_grad_input`] of one `dy`, of which both may need the same.
    fn linear_f32_grads(
        &self,
        dims: GemmDims,
        dy: View<'_, Self, f32>,
        (x, w): (View<'_, Self, Self::Act>, View<'_, Self, Self::Act>),
        dw: ViewMut<'_, Self, f32>,
        (dx, accumulate): (ViewMut<'_, Self, Self::Act>, Accumulate),
    ) {
        self.linear_f32_grad_weight(dims, dy, x, dw);
        self.linear_f32_grad_input(dims, dy, w, dx, accumulate);
    }

    /// RMSNorm (Zhang and Sennrich 2019): `y = x · rstd · w`, `rstd = 1/√(mean(x²) + eps)`, statistics in f32.
    /// `rstd` is `[tokens · groups]`, kept for the backward pass.
    fn rms_norm(
        &self,
        dims: NormDims,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        y: ViewMut<'_, Self, Self::Act>,
        rstd: ViewMut<'_, Self, f32>,
    );
    /// Backward of [`DenseOps::rms_norm`]: `dx (+)= …`, `dw[width] += …`. With [`NormDims::groups`] > 1 the weight is shared by
    /// the groups, and only the normalised elements of `dx` are written.
    #[allow(clippy::too_many_arguments)] // the arguments are the mathematics: three saved tensors, one incoming, two outgoing
    fn rms_norm_grad(
        &self,
        dims: NormDims,
        dy: View<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        rstd: View<'_, Self, f32>,
        dx: ViewMut<'_, Self, Self::Act>,
        dw: ViewMut<'_, Self, f32>,
        accumulate: Accumulate,
    );

    /// SwiGLU (Shazeer 2020) of a fused `h[rows, 2F]`, gate columns first: `a[rows, F] = silu(h[:, ..F]) · h[:, F..]`.
    fn swiglu(&self, rows: Rows<'_, Self>, f: usize, h: View<'_, Self, Self::Act>, a: ViewMut<'_, Self, Self::Act>);
    /// Backward of [`DenseOps::swiglu`]: `dh[rows, 2F]` from `da[rows, F]` and the saved `h`.
    fn swiglu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        da: View<'_, Self, Self::Act>,
        h: View<'_, Self, Self::Act>,
        dh: ViewMut<'_, Self, Self::Act>,
    );

    /// `y = f(x)`, element by element; both of one length.
    fn activation(&self, kind: ActivationKind, x: View<'_, Self, Self::Act>, y: ViewMut<'_, Self, Self::Act>);
    /// Backward of [`DenseOps::activation`]: `dx = dy · f′(x)` from the saved `x`; all of one length.
    fn activation_grad(
        &self,
        kind: ActivationKind,
        x: View<'_, Self, Self::Act>,
        dy: View<'_, Self, Self::Act>,
        dx: ViewMut<'_, Self, Self::Act>,
    );

    /// `out[T, H]`: row `ids[t]` of `table[V, H]`.
    fn embedding(
        &self,
        h: usize,
        ids: View<'_, Self, i32>,
        table: View<'_, Self, Self::Act>,
        out: ViewMut<'_, Self, Self::Act>,
    );
    /// `dtable[ids[t]] += dout[t]`, tokens ascending.
    fn embedding_grad(
        &self,
        h: usize,
        ids: View<'_, Self, i32>,
        dout: View<'_, Self, Self::Act>,
        dtable: ViewMut<'_, Self, f32>,
    );

    /// `y += x`, element by element.
    fn add(&self, x: View<'_, Self, Self::Act>, y: ViewMut<'_, Self, Self::Act>);

    /// `y += x` of f32 statistics.
    fn add_f32(&self, x: View<'_, Self, f32>, y: ViewMut<'_, Self, f32>);

    /// The shared expert's gate (Qwen2-MoE): `out[T, H] += sigmoid(gate[T]) · shared[T, H]`.
    fn sigmoid_gate(
        &self,
        h: usize,
        gate: View<'_, Self, f32>,
        shared: View<'_, Self, Self::Act>,
        out: ViewMut<'_, Self, Self::Act>,
    );
    /// Backward of [`DenseOps::sigmoid_gate`]: `dshared[T, H]` and `dgate[T]`, both overwritten.
    fn sigmoid_gate_grad(
        &self,
        h: usize,
        dout: View<'_, Self, Self::Act>,
        gate: View<'_, Self, f32>,
        shared: View<'_, Self, Self::Act>,
        dshared: ViewMut<'_, Self, Self::Act>,
        dgate: ViewMut<'_, Self, f32>,
    );
}
