//! Embedding lookup and its gradient.
//!
//! Owns the order in which rows are added to the table's gradient: tokens ascending, whatever the number of threads, because
//! threads share out the columns and not the tokens.

use super::parallel::{SharedRows, for_parts, parts, rows_mut};

/// The table row of an id. Panics if there is none.
fn row_of(id: i32, rows: usize) -> usize {
    match usize::try_from(id) {
        Ok(row) if row < rows => row,
        _ => panic!("token id {id} is not in a table of {rows} rows"),
    }
}

pub(super) fn embedding(h: usize, ids: &[i32], table: &[f32], out: &mut [f32]) {
    let (tokens, rows) = (ids.len(), table.len().checked_div(h).unwrap_or(0));
    assert!(out.len() >= tokens * h, "out has {} elements for {tokens} tokens x {h}", out.len());
    if h == 0 {
        return;
    }
    for_parts(tokens, parts(tokens * h), rows_mut(&mut out[..tokens * h], h), |range, out| {
        for (id, out) in ids[range].iter().zip(out.data.chunks_exact_mut(h)) {
            let from = row_of(*id, rows) * h;
            out.copy_from_slice(&table[from..from + h]);
        }
    });
}

pub(super) fn embedding_grad(h: usize, ids: &[i32], dout: &[f32], dtable: &mut [f32]) {
    let (tokens, rows) = (ids.len(), dtable.len().checked_div(h).unwrap_or(0));
    assert!(dout.len() >= tokens * h, "dout has {} elements for {tokens} tokens x {h}", dout.len());
    let dtable = SharedRows::new(dtable, h);
    for_parts(h, parts(tokens * h), (), |columns, ()| {
        for (token, id) in ids.iter().enumerate() {
            let dout = &dout[token * h..][columns.clone()];
            // SAFETY: each part writes its own columns, and holds one segment at a time.
            let to = unsafe { dtable.segment(row_of(*id, rows), columns.clone()) };
            for (to, x) in to.iter_mut().zip(dout) {
                *to += x;
            }
        }
    });
}
