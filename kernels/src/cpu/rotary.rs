//! Rotary position embedding of the query and key heads of fused rows, and back.
//!
//! Owns the rotation of a row. The angles are the caller's; positions begin anew with each sequence.

use multiversion::multiversion;

use super::parallel::{for_parts, parts, rows_mut};
use crate::{AttentionDims, RotaryDirection};

pub(super) fn rotary(dims: AttentionDims, direction: RotaryDirection, cos: &[f32], sin: &[f32], qkv: &mut [f32]) {
    let (tokens, width, half) = (dims.tokens(), dims.qkv_width(), dims.head_dim / 2);
    assert_eq!(dims.head_dim, 2 * half, "rotary embedding pairs the halves of a head");
    assert!(cos.len() >= dims.seq * half && sin.len() >= dims.seq * half, "angles of {} positions x {half}", dims.seq);
    assert!(qkv.len() >= tokens * width, "qkv of {} elements for {tokens} tokens x {width}", qkv.len());
    let sign = if direction == RotaryDirection::Forward { 1.0 } else { -1.0 };
    let rotated = (dims.heads + dims.kv_heads) * dims.head_dim;
    for_parts(tokens, parts(tokens * rotated), rows_mut(&mut qkv[..tokens * width], width), |range, part| {
        for (token, row) in range.zip(part.data.chunks_exact_mut(width)) {
            let angles = (token % dims.seq) * half..(token % dims.seq + 1) * half;
            rotate_row(&mut row[..rotated], &cos[angles.clone()], &sin[angles], sign);
        }
    });
}

/// Rotates every head of a row; heads are twice as wide as the angles are many.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let s = sign * s;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}
