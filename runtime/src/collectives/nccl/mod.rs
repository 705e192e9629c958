//! The communicator between GPUs: NCCL on a stream of its own, watched by a thread.
//!
//! Owns the ordering of that stream against the caller's by events, the cut of reductions, and what a collective that fails is
//! reported as. What ranks exchange in host memory, and what a rank alone does, a [`HostCommunicator`] of the same ranks does.
//!
//! A collective is issued and returns; the host waits the first time two ranks talk, until they are connected. All groups of a worker
//! issue to one stream, in the order of their calls: two communicators that wait for each other's multiprocessors cannot come about.
//!
//! Reductions are exchanges and a fold in ascending rank order, and not NCCL's own: those add in the order of a ring that is another for
//! each part of a buffer, and lose a NaN in a maximum. The bytes on the way are the same.

mod landing;
mod meeting;
mod plane;
mod reduce;
mod watch;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use moe_kernels::cuda::{Cuda, CudaAct, Event, address, address_mut};
use moe_kernels::{Element, View, ViewMut};
use nccl_rs::{DeviceSlice, DeviceSliceMut};

pub use meeting::{MeetError, Meeting, OnFailure};

use super::exchange::Collective;
use super::{
    Berth, CollectiveError, Communicator, Context, HostCommunicator, Landing, Place, ReduceOp, Reducible, fit,
};
use crate::topology::Rank;
use plane::Plane;

type Result<T> = std::result::Result<T, CollectiveError>;

/// A group of ranks with a GPU each.
pub struct NcclCommunicator<A: CudaAct> {
    /// The same group, for host memory.
    control: HostCommunicator,
    /// None: the rank is alone in it.
    link: Option<Arc<Link<A>>>,
}

/// The group's communicator, and what all groups of the worker share.
struct Link<A: CudaAct> {
    /// Before the plane: it ends while there still is a stream.
    nccl: Arc<nccl_rs::Communicator>,
    plane: Arc<Plane<A>>,
    name: Arc<str>,
    /// The other ranks.
    others: Arc<[Rank]>,
    /// By which ranks tell each other of rows that they have stored; None: they do not reach each other. Not known before anybody asks.
    marks: OnceLock<Option<Arc<landing::Marks>>>,
    /// Bytes this rank has sent to others, by collective.
    sent: [AtomicU64; Collective::ALL.len()],
}

impl<A: CudaAct> fmt::Debug for NcclCommunicator<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclCommunicator").field("control", &self.control).finish_non_exhaustive()
    }
}

/// A view as NCCL sees it: bytes.
fn source<A: CudaAct, T: Element>(view: View<'_, Cuda<A>, T>) -> DeviceSlice<u8> {
    // SAFETY: the view is of a live buffer of the GPU that the communicator is made with, and freeing it waits for the device: so it
    // lives until the stream has passed. Who writes to it before waiting for the collective's event garbles numbers, not memory.
    unsafe { DeviceSlice::new(address(view), view.len() * T::BYTES) }
}

/// As [`source`], to be written.
fn target<A: CudaAct, T: Element>(view: ViewMut<'_, Cuda<A>, T>) -> DeviceSliceMut<u8> {
    let bytes = view.len() * T::BYTES;
    // SAFETY: as in `source`; the view is borrowed mutably, so no other of the collective overlaps it.
    unsafe { DeviceSliceMut::new(address_mut(view), bytes) }
}

impl<A: CudaAct> Drop for Link<A> {
    fn drop(&mut self) {
        // A communicator ends in order together with its peers: NCCL waits until those of this machine have closed their connections,
        // which they never do once the job was given up, of which the watch may not know yet, or wait for a rank that has panicked.
        let panics = || CollectiveError::Aborted { culprit: None, reason: "this rank has panicked".into() };
        if let Some(error) = self.plane.check().err().or_else(|| std::thread::panicking().then(panics)) {
            self.plane.fail(error);
        }
    }
}

impl<A: CudaAct> Link<A> {
    fn new(plane: Arc<Plane<A>>, nccl: nccl_rs::Communicator, control: &HostCommunicator) -> Self {
        let me = control.rank();
        let others = control.members().iter().enumerate().filter(|(rank, _)| *rank != me).map(|(_, member)| *member);
        let nccl = Arc::new(nccl);
        plane.watch(&nccl);
        Self {
            nccl,
            plane,
            name: control.name().into(),
            others: others.collect(),
            marks: OnceLock::new(),
            sent: Default::default(),
        }
    }

    fn size(&self) -> usize {
        self.nccl.size()
    }

    fn rank(&self) -> usize {
        self.nccl.rank()
    }

    /// A call of this group.
    fn call(&self, collective: Collective, bytes: usize) -> plane::Call<'_, A> {
        let context = self.plane.context();
        let place = Place {
            collective: collective.name(),
            group: Arc::clone(&self.name),
            step: context.step(),
            layer: context.layer(),
            bytes: bytes as u64,
        };
        plane::Call { plane: &self.plane, nccl: &self.nccl, place, others: Arc::clone(&self.others) }
    }

    fn count_sent(&self, collective: Collective, bytes: usize) {
        self.sent[collective as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn all_to_all<T: Element>(
        &self,
        queue: &Cuda<A>,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
    ) -> Result<Event> {
        let bytes = send.len() * T::BYTES;
        let block = bytes / self.size();
        let counts = vec![block; self.size()];
        self.count_sent(Collective::AllToAll, bytes - block);
        let (send, mut recv) = (source(send), target(recv));
        self.call(Collective::AllToAll, bytes).run(queue, |call| {
            call.group(|group, stream| group.all_to_all_v((send, &counts), (&mut recv, &counts), stream))
        })
    }

    fn all_to_all_v<T: Element>(
        &self,
        queue: &Cuda<A>,
        width: usize,
        (send, send_rows): (View<'_, Cuda<A>, T>, &[Range<usize>]),
        (mut recv, recv_rows): (ViewMut<'_, Cuda<A>, T>, &[Range<usize>]),
    ) -> Result<Event> {
        let bytes = send_rows.iter().map(|rows| rows.len() * width * T::BYTES).sum::<usize>();
        let call = self.call(Collective::AllToAllV, bytes);
        for (what, ranges, len) in [("send", send_rows, send.len()), ("receive", recv_rows, recv.len())] {
            let rows = len / width;
            if !fit(ranges, rows) {
                let Place { collective, group, step, .. } = call.place;
                let (group, ranges) = (group.to_string(), ranges.to_vec());
                // The others wait for what this rank does not send.
                return Err(call.plane.fail(CollectiveError::Rows { collective, group, step, what, ranges, rows }));
            }
        }
        self.count_sent(Collective::AllToAllV, bytes - send_rows[self.rank()].len() * width * T::BYTES);
        let elements = |rows: &Range<usize>| rows.start * width..rows.end * width;
        call.run(queue, |call| {
            call.group(|group, stream| {
                for (peer, (outgoing, incoming)) in send_rows.iter().zip(recv_rows).enumerate() {
                    if !outgoing.is_empty() {
                        group.send(source(send.slice(elements(outgoing))), peer, stream)?;
                    }
                    if !incoming.is_empty() {
                        group.recv(&mut target(recv.reborrow().slice(elements(incoming))), peer, stream)?;
                    }
                }
                Ok(())
            })
        })
    }

    fn all_gather<T: Element>(
        &self,
        queue: &Cuda<A>,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
    ) -> Result<Event> {
        let bytes = send.len() * T::BYTES;
        self.count_sent(Collective::AllGather, bytes * (self.size() - 1));
        let (send, mut recv) = (source(send), target(recv));
        self.call(Collective::AllGather, bytes)
            .run(queue, |call| call.group(|group, stream| group.all_gather(send, &mut recv, stream)))
    }

    fn broadcast<T: Element>(&self, queue: &Cuda<A>, buffer: ViewMut<'_, Cuda<A>, T>, root: usize) -> Result<Event> {
        let bytes = buffer.len() * T::BYTES;
        if self.rank() == root {
            self.count_sent(Collective::Broadcast, bytes);
        }
        let mut buffer = target(buffer);
        self.call(Collective::Broadcast, bytes)
            .run(queue, |call| call.group(|group, stream| group.broadcast(&mut buffer, root, stream)))
    }

    fn split(&self, control: &HostCommunicator) -> Result<Option<Arc<Self>>> {
        // Distinct groups have distinct first members; a rank alone needs no communicator.
        let color = (control.size() > 1).then(|| control.members().iter().map(|rank| rank.0).min()).flatten();
        let call = self.call(Collective::Split, 0);
        let child = call.split(color, control.rank())?;
        Ok(child.map(|nccl| Arc::new(Self::new(Arc::clone(&self.plane), nccl, control))))
    }
}

impl<A: CudaAct> Communicator<Cuda<A>> for NcclCommunicator<A> {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn members(&self) -> &[Rank] {
        self.control.members()
    }

    fn name(&self) -> &str {
        self.control.name()
    }

    fn context(&self) -> &Context {
        self.control.context()
    }

    fn all_to_all<T: Element>(
        &self,
        queue: &Cuda<A>,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
    ) -> Result<Event> {
        let Some(link) = &self.link else { return self.control.all_to_all(queue, send, recv) };
        let size = link.size();
        assert!(
            send.len() == recv.len() && send.len().is_multiple_of(size),
            "all_to_all over {size} ranks: send {}, receive {} elements",
            send.len(),
            recv.len()
        );
        link.all_to_all(queue, send, recv)
    }

    fn all_to_all_v<T: Element>(
        &self,
        queue: &Cuda<A>,
        width: usize,
        outgoing: (View<'_, Cuda<A>, T>, &[Range<usize>]),
        incoming: (ViewMut<'_, Cuda<A>, T>, &[Range<usize>]),
    ) -> Result<Event> {
        let Some(link) = &self.link else { return self.control.all_to_all_v(queue, width, outgoing, incoming) };
        let (size, sends, receives) = (link.size(), outgoing.1.len(), incoming.1.len());
        assert!(
            width > 0 && sends == size && receives == size,
            "all_to_all_v over {size} ranks: width {width}, {sends} send and {receives} receive ranges"
        );
        link.all_to_all_v(queue, width, outgoing, incoming)
    }

    fn all_reduce<T: Reducible>(
        &self,
        queue: &Cuda<A>,
        buffer: ViewMut<'_, Cuda<A>, T>,
        op: ReduceOp,
    ) -> Result<Event> {
        match &self.link {
            Some(link) => link.all_reduce(queue, buffer, op),
            None => self.control.all_reduce(queue, buffer, op),
        }
    }

    fn reduce_scatter<T: Reducible>(
        &self,
        queue: &Cuda<A>,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
        op: ReduceOp,
    ) -> Result<Event> {
        let Some(link) = &self.link else { return self.control.reduce_scatter(queue, send, recv, op) };
        let size = link.size();
        assert_eq!(send.len(), recv.len() * size, "reduce_scatter over {size} ranks: elements of send, and due");
        link.reduce_scatter(queue, send, recv, op)
    }

    fn all_gather<T: Element>(
        &self,
        queue: &Cuda<A>,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
    ) -> Result<Event> {
        let Some(link) = &self.link else { return self.control.all_gather(queue, send, recv) };
        let size = link.size();
        assert_eq!(recv.len(), send.len() * size, "all_gather over {size} ranks: elements of recv, and due");
        link.all_gather(queue, send, recv)
    }

    fn broadcast<T: Element>(&self, queue: &Cuda<A>, buffer: ViewMut<'_, Cuda<A>, T>, root: usize) -> Result<Event> {
        let Some(link) = &self.link else { return self.control.broadcast(queue, buffer, root) };
        assert!(root < link.size(), "root {root} of {} ranks", link.size());
        link.broadcast(queue, buffer, root)
    }

    fn may_land(&self) -> bool {
        self.link.is_some()
    }

    fn landing(&self, queue: &Cuda<A>, berth: &Berth<'_, Cuda<A>>) -> Result<Option<Box<dyn Landing<Cuda<A>>>>> {
        self.link.as_ref().map_or(Ok(None), |link| landing::land(link, queue, &self.control, berth))
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.control.all_gather_bytes(mine)
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        self.control.broadcast_bytes(bytes, root)
    }

    fn barrier(&self) -> Result<()> {
        self.control.barrier()
    }

    fn check(&self) -> Result<()> {
        match &self.link {
            Some(link) => link.plane.check(),
            None => self.control.context().aborted().map_or(Ok(()), Err),
        }
    }

    fn sent_bytes(&self) -> Vec<(&'static str, u64)> {
        let mut sent = self.control.sent_bytes();
        if let Some(link) = &self.link {
            let counted = Collective::ALL.into_iter().zip(&link.sent);
            let counted = counted.map(|(which, sent)| (which.name(), sent.load(Ordering::Relaxed)));
            sent.extend(counted.filter(|(_, sent)| *sent > 0));
        }
        sent
    }

    fn staging_bytes(&self) -> u64 {
        let staged = self.link.as_ref().map_or(0, |link| link.plane.staging_bytes());
        self.control.staging_bytes() + staged
    }

    fn split(&self, name: &str, color: usize, key: usize) -> Result<Self> {
        let control = self.control.split(name, color, key)?;
        let link = match &self.link {
            Some(link) => link.split(&control)?,
            None => None,
        };
        Ok(Self { control, link })
    }
}
