//! A group of collectives that are started together.

use std::ffi::c_int;
use std::marker::PhantomData;

use crate::communicator::{Held, Shared, set_in_group};
use crate::{DeviceSlice, DeviceSliceMut, Element, Error, Progress, ReduceOp, Stream};

/// What is issued to one communicator between its beginning and its [`Group::end`]. Until then no other thread can use the
/// communicator, and this thread none: a group belongs to the thread that began it.
///
/// A group that is dropped without `end` has started what was issued to it. Its peers may wait for more, so the communicator is aborted
/// then, unless the group was empty.
#[must_use = "a group that is not ended aborts its communicator"]
pub struct Group<'a> {
    held: Held<'a>,
    issued: usize,
    failed: Option<Error>,
    ended: bool,
    /// `ncclGroupStart` and `ncclGroupEnd` count per thread.
    not_send: PhantomData<*const ()>,
}

impl<'a> Group<'a> {
    pub(crate) fn begin(shared: &'a Shared) -> Result<Self, Error> {
        const CALL: &str = "ncclGroupStart";
        let held = shared.hold(CALL)?;
        // SAFETY: NCCL counts this thread's groups; `close` ends this one, in `end` or in `drop`.
        let code = unsafe { (held.nccl().symbols().group_start)() };
        held.nccl().done(CALL, code, held.comm())?;
        set_in_group(true);
        Ok(Self { held, issued: 0, failed: None, ended: false, not_send: PhantomData })
    }

    /// Starts what was issued, and says how far that has come.
    ///
    /// # Errors
    /// The first of what was issued; NCCL's own.
    pub fn end(mut self) -> Result<Progress, Error> {
        let ended = self.close();
        self.failed.take().map_or(ended, Err)
    }

    fn close(&mut self) -> Result<Progress, Error> {
        self.ended = true;
        set_in_group(false);
        // SAFETY: it was started by `begin` on this same thread, since a group cannot be sent, and ends once.
        let code = unsafe { (self.held.nccl().symbols().group_end)() };
        self.held.progress("ncclGroupEnd", code)
    }

    /// What became of one call of the group; NCCL refuses the whole group after a failure.
    fn issue(&mut self, call: &'static str, code: c_int) -> Result<(), Error> {
        self.issued += 1;
        match self.held.progress(call, code) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.failed.get_or_insert_with(|| error.clone());
                Err(error)
            }
        }
    }

    fn peer(&self, call: &'static str, rank: usize) -> Result<c_int, Error> {
        let size = self.held.size();
        if rank < size { Ok(rank as c_int) } else { Err(Error::NoSuchRank { call, rank, size }) }
    }

    /// Sends `send` to `peer`, which receives as much in a group of its own. To oneself both belong into the same group.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; NCCL's own.
    pub fn send<T: Element>(&mut self, send: DeviceSlice<T>, peer: usize, stream: Stream) -> Result<(), Error> {
        const CALL: &str = "ncclSend";
        let peer = self.peer(CALL, peer)?;
        let (function, comm) = (self.held.nccl().symbols().send, self.held.comm());
        // SAFETY: the communicator is held; memory and stream are what the makers of the slice and the stream promise.
        let code = unsafe { function(send.pointer(), send.len(), T::TYPE, peer, comm, stream.raw()) };
        self.issue(CALL, code)
    }

    /// Receives from `peer` what it sends; see [`Group::send`].
    ///
    /// # Errors
    /// As there.
    pub fn recv<T: Element>(&mut self, recv: &mut DeviceSliceMut<T>, peer: usize, stream: Stream) -> Result<(), Error> {
        const CALL: &str = "ncclRecv";
        let peer = self.peer(CALL, peer)?;
        let (function, comm) = (self.held.nccl().symbols().recv, self.held.comm());
        // SAFETY: as in `send`.
        let code = unsafe { function(recv.pointer(), recv.len(), T::TYPE, peer, comm, stream.raw()) };
        self.issue(CALL, code)
    }

    /// The first `send_counts[0]` elements of `send` go to rank 0, the next `send_counts[1]` to rank 1, and so on; `recv` is filled in
    /// the same way from `recv_counts`, which must be what the peers send. Elements beyond the counted ones are left alone; a
    /// pair of ranks with nothing to say exchanges no message.
    ///
    /// # Errors
    /// [`Error::Length`]: counts for other than all ranks, or of more elements than there are; nothing is issued then. NCCL's own.
    pub fn all_to_all_v<T: Element>(
        &mut self,
        (send, send_counts): (DeviceSlice<T>, &[usize]),
        (recv, recv_counts): (&mut DeviceSliceMut<T>, &[usize]),
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "all_to_all_v";
        let size = self.held.size();
        for (what, counts) in [("the list of send counts", send_counts), ("the list of receive counts", recv_counts)] {
            due(CALL, what, counts.len(), size, counts.len() == size)?;
        }
        for (what, len, counts) in [("send", send.len(), send_counts), ("recv", recv.len(), recv_counts)] {
            let counted = counts.iter().fold(0_usize, |sum, count| sum.saturating_add(*count));
            due(CALL, what, len, counted, counted <= len)?;
        }
        let (mut sent, mut received) = (0, 0);
        for peer in 0..size {
            let (outgoing, incoming) = (send_counts[peer], recv_counts[peer]);
            if outgoing > 0 {
                self.send(send.part(sent, outgoing), peer, stream)?;
            }
            if incoming > 0 {
                self.recv(&mut recv.part(received, incoming), peer, stream)?;
            }
            sent += outgoing;
            received += incoming;
        }
        Ok(())
    }

    /// `buffer` becomes the reduction of all ranks' buffers.
    ///
    /// # Errors
    /// NCCL's own.
    pub fn all_reduce<T: Element>(
        &mut self,
        buffer: &mut DeviceSliceMut<T>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let (at, function, comm) = (buffer.pointer(), self.held.nccl().symbols().all_reduce, self.held.comm());
        // SAFETY: as in `send`; NCCL reduces in place where both addresses are the same.
        let code = unsafe { function(at, at, buffer.len(), T::TYPE, op.raw(), comm, stream.raw()) };
        self.issue("ncclAllReduce", code)
    }

    /// `recv [n]` becomes the reduction of block `rank` of all ranks' `send [W, n]`.
    ///
    /// # Errors
    /// [`Error::Length`]; NCCL's own.
    pub fn reduce_scatter<T: Element>(
        &mut self,
        send: DeviceSlice<T>,
        recv: &mut DeviceSliceMut<T>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclReduceScatter";
        let whole = recv.len() * self.held.size();
        due(CALL, "send", send.len(), whole, send.len() == whole)?;
        let (function, comm) = (self.held.nccl().symbols().reduce_scatter, self.held.comm());
        // SAFETY: as in `send`; the lengths were compared.
        let code =
            unsafe { function(send.pointer(), recv.pointer(), recv.len(), T::TYPE, op.raw(), comm, stream.raw()) };
        self.issue(CALL, code)
    }

    /// Block i of `recv [W, n]` becomes `send [n]` of rank i; `send` may be block `rank` of `recv`.
    ///
    /// # Errors
    /// [`Error::Length`]; NCCL's own.
    pub fn all_gather<T: Element>(
        &mut self,
        send: DeviceSlice<T>,
        recv: &mut DeviceSliceMut<T>,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclAllGather";
        let whole = send.len() * self.held.size();
        due(CALL, "recv", recv.len(), whole, recv.len() == whole)?;
        let (function, comm) = (self.held.nccl().symbols().all_gather, self.held.comm());
        // SAFETY: as in `send`; the lengths were compared.
        let code = unsafe { function(send.pointer(), recv.pointer(), send.len(), T::TYPE, comm, stream.raw()) };
        self.issue(CALL, code)
    }

    /// `buffer` becomes that of rank `root`.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; NCCL's own.
    pub fn broadcast<T: Element>(
        &mut self,
        buffer: &mut DeviceSliceMut<T>,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclBroadcast";
        let root = self.peer(CALL, root)?;
        let (at, function, comm) = (buffer.pointer(), self.held.nccl().symbols().broadcast, self.held.comm());
        // SAFETY: as in `send`; NCCL broadcasts in place where both addresses are the same.
        let code = unsafe { function(at, at, buffer.len(), T::TYPE, root, comm, stream.raw()) };
        self.issue(CALL, code)
    }
}

fn due(call: &'static str, what: &'static str, found: usize, due: usize, fits: bool) -> Result<(), Error> {
    if fits { Ok(()) } else { Err(Error::Length { call, what, found, due }) }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let _ = self.close();
        if self.issued > 0 {
            // Nobody is left to hear of a failure.
            let _ = self.held.abort();
        }
    }
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
