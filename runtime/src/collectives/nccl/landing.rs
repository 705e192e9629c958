//! Landings between the GPUs of one machine: each maps the others' buffers and stores into them, which needs no copy into messages and no
//! library on the way.
//!
//! Owns the agreement on who reaches whom: all ranks of a group have a landing, or none has. Order and failure are the plane's, as for
//! every collective of these GPUs.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use moe_kernels::cuda::{Cuda, CudaAct, CudaBuffer, Destination, Event, MOST_PEERS, Mapped, Pushed, Shared, address};
use moe_kernels::{Device, DeviceError, Element, View};
use serde::{Deserialize, Serialize};

use super::{Link, Result};
use crate::collectives::exchange::Collective;
use crate::collectives::{BERTH_PAGE, Berth, HostCommunicator, Landing, Push};

/// What tells one machine from another, the same in all its containers.
const MACHINE: &str = "/proc/sys/kernel/random/boot_id";
/// Another text each time it is read.
const RANDOM: &str = "/proc/sys/kernel/random/uuid";

/// What a push is given to begin: more than a launch takes, less than is lost where something else is in front of it.
const PATIENCE: Duration = Duration::from_micros(20);

/// What tells this process from every other; numbers of processes are the same in different containers. None: there is no such thing here.
fn process() -> Option<String> {
    static PROCESS: OnceLock<Option<String>> = OnceLock::new();
    PROCESS.get_or_init(|| std::fs::read_to_string(RANDOM).ok()).clone()
}

/// The words by which the ranks of a group tell each other that rows have come.
pub(super) struct Marks {
    /// `[W]`: what each rank has told this one.
    own: CudaBuffer<i32>,
    others: Vec<Mapped>,
    /// The last push of the group.
    last: AtomicU32,
}

/// A buffer that a rank offers.
#[derive(Clone, Serialize, Deserialize)]
struct Offered {
    handle: Vec<u8>,
    offset: u64,
    address: u64,
}

impl From<Shared> for Offered {
    fn from(Shared { handle, offset, address }: Shared) -> Self {
        Self { handle, offset, address }
    }
}

/// What a rank tells the others, if it has anything to offer.
#[derive(Serialize, Deserialize)]
struct Offer {
    machine: String,
    process: String,
    ordinal: usize,
    buffers: Vec<Offered>,
}

/// The buffers of the others.
struct Mapper<'a, A: CudaAct> {
    queue: &'a Cuda<A>,
    control: &'a HostCommunicator,
}

impl<A: CudaAct> Mapper<'_, A> {
    /// `[W, buffers]`: each rank's buffers as this GPU reaches them, none of its own. None, on all ranks: some rank does not reach another.
    fn map(&self, mine: std::result::Result<Vec<Shared>, DeviceError>) -> Result<Option<Vec<Vec<Mapped>>>> {
        let offer = |buffers: Vec<Shared>| {
            let machine = std::fs::read_to_string(MACHINE).ok()?;
            let buffers = buffers.into_iter().map(Offered::from).collect();
            Some(Offer { machine, process: process()?, ordinal: self.queue.ordinal(), buffers })
        };
        let mine = mine.ok().and_then(offer);
        let told = self.control.all_gather_bytes(&serde_json::to_vec(&mine).unwrap_or_default())?;
        let offers: Option<Vec<Offer>> =
            told.iter().map(|bytes| serde_json::from_slice(bytes).ok().flatten()).collect();
        let mapped = offers.and_then(|offers| self.map_all(&offers));
        // One rank that cannot is enough for none to do it.
        let all = self.control.all_gather_bytes(&[u8::from(mapped.is_some())])?;
        Ok(mapped.filter(|_| all.iter().all(|can| *can == [1])))
    }

    fn map_all(&self, offers: &[Offer]) -> Option<Vec<Vec<Mapped>>> {
        let me = self.control.rank();
        let mine = offers.get(me)?;
        let of = |(rank, offer): (usize, &Offer)| {
            if rank == me {
                return Some(Vec::new());
            }
            let same = offer.machine == mine.machine && offer.buffers.len() == mine.buffers.len();
            let map = |Offered { handle, offset, address }: &Offered| {
                let shared = Shared { handle: handle.clone(), offset: *offset, address: *address };
                let mapped = match offer.process == mine.process {
                    true => self.queue.map_own(&shared, offer.ordinal),
                    false => self.queue.map(&shared),
                };
                mapped.inspect_err(|error| tracing::debug!(%error, rank, "no way into its memory")).ok()
            };
            if same { offer.buffers.iter().map(map).collect() } else { None }
        };
        offers.iter().enumerate().map(of).collect()
    }
}

impl Marks {
    /// The marks of a group; None, on all ranks, where they do not reach each other.
    fn new<A: CudaAct>(queue: &Cuda<A>, control: &HostCommunicator) -> Result<Option<Self>> {
        if control.size() > MOST_PEERS {
            return Ok(None);
        }
        let own = queue.alloc::<i32>(BERTH_PAGE / i32::BYTES, "marks of arrived rows");
        let shared = own.as_ref().map_err(Clone::clone).and_then(|own| queue.share(View::<Cuda<A>, i32>::of(own)));
        let Some(others) = (Mapper { queue, control }).map(shared.map(|shared| vec![shared]))? else { return Ok(None) };
        // The others' memory is cleared before they offer it.
        Ok(Some(Self { own: own?, others: others.into_iter().flatten().collect(), last: AtomicU32::new(0) }))
    }

    /// Where each rank's are.
    fn addresses<A: CudaAct>(&self, me: usize) -> Vec<u64> {
        let mut addresses: Vec<_> = self.others.iter().map(Mapped::address).collect();
        addresses.insert(me, address(View::<Cuda<A>, i32>::of(&self.own)));
        addresses
    }

    /// The mark of the next push; never 0.
    fn next(&self) -> u32 {
        let next = || self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        std::iter::repeat_with(next).find(|mark| *mark != 0).unwrap_or(1)
    }
}

/// The berths of a group.
struct Berths<A: CudaAct> {
    /// Keeps the places mapped; before the link, whose stream's end is waited for.
    _mapped: Vec<Vec<Mapped>>,
    /// Where each rank's berth begins.
    places: Vec<Destination>,
    /// Elements of rows that each of them has room for, and numbers that go along.
    room: (usize, usize),
    marks: Arc<Marks>,
    link: Arc<Link<A>>,
}

/// The berths of all ranks of a group, with `berth` for this one's; None, on all ranks, where they do not reach each other.
pub(super) fn land<A: CudaAct>(
    link: &Arc<Link<A>>,
    queue: &Cuda<A>,
    control: &HostCommunicator,
    berth: &Berth<'_, Cuda<A>>,
) -> Result<Option<Box<dyn Landing<Cuda<A>>>>> {
    let marks = match link.marks.get() {
        Some(marks) => marks.clone(),
        None => {
            let marks = Marks::new(queue, control)?.map(Arc::new);
            link.marks.get_or_init(|| marks).clone()
        }
    };
    let Some(marks) = marks else { return Ok(None) };
    let mine = || {
        let mut mine = vec![queue.share(berth.rows)?];
        mine.extend(berth.ids.map(|ids| queue.share(ids)).transpose()?);
        mine.extend(berth.weights.map(|weights| queue.share(weights)).transpose()?);
        Ok(mine)
    };
    let Some(mapped) = (Mapper { queue, control }).map(mine())? else { return Ok(None) };
    let of = |(rank, (buffers, marks)): (usize, (&Vec<Mapped>, u64))| {
        if rank == control.rank() {
            return Destination {
                rows: address(berth.rows),
                ids: berth.ids.map_or(0, address),
                weights: berth.weights.map_or(0, address),
                marks,
            };
        }
        let mut buffers = buffers.iter().map(Mapped::address);
        let mut next = |offered: bool| if offered { buffers.next().unwrap_or(0) } else { 0 };
        Destination { rows: next(true), ids: next(berth.ids.is_some()), weights: next(berth.weights.is_some()), marks }
    };
    let places = mapped.iter().zip(marks.addresses::<A>(control.rank())).enumerate().map(of).collect();
    // Berths are alike on all ranks.
    let numbers = [berth.ids.map(|ids| ids.len()), berth.weights.map(|weights| weights.len())];
    let room = (berth.rows.len(), numbers.into_iter().flatten().min().unwrap_or(0));
    Ok(Some(Box::new(Berths { _mapped: mapped, places, room, marks, link: Arc::clone(link) })))
}

impl<A: CudaAct> Berths<A> {
    /// Panics where `rows` that land from row `at` on would be beyond a berth.
    fn check(&self, push: &Push<'_, Cuda<A>>, at: usize, rows: &Range<usize>) {
        let end = at + rows.len();
        let (k, goes_along) = (push.what.numbers(), push.what.row_bytes(push.width) > push.width * A::BYTES);
        assert!(
            end * push.width <= self.room.0 && (!goes_along || end * k <= self.room.1),
            "rows {at}..{end} of {} elements and {k} numbers, in a berth of {:?}",
            push.width,
            self.room
        );
    }

    /// The place of rank `at`'s berth where rows from `row` on land.
    fn place(&self, at: usize, row: usize, push: &Push<'_, Cuda<A>>) -> Destination {
        let Destination { rows, ids, weights, marks } = self.places[at];
        let k = push.what.numbers();
        // Of what does not go along there is no address either, but the kernel does not look at it.
        let behind = |base: u64, bytes: usize| base + (row * bytes) as u64;
        Destination {
            rows: behind(rows, push.width * A::BYTES),
            ids: behind(ids, k * i32::BYTES),
            weights: behind(weights, k * f32::BYTES),
            marks,
        }
    }

    fn issue(&self, queue: &Cuda<A>, push: &Push<'_, Cuda<A>>, peers: &[Destination], signal: bool) -> Result<Event> {
        let Push { width, what, rows, beside, .. } = *push;
        let row_bytes = what.row_bytes(width);
        let bytes = rows.iter().map(ExactSizeIterator::len).sum::<usize>() * row_bytes;
        let me = self.link.rank();
        if signal {
            self.link.count_sent(Collective::AllToAllV, bytes - rows[me].len() * row_bytes);
        }
        self.link.call(Collective::AllToAllV, bytes).run(queue, |call| {
            let mark = if signal { self.marks.next() } else { 0 };
            let pushed = Pushed { width, what, rows, beside };
            // SAFETY: peers' addresses are of buffers that are mapped as long as this landing, whose places hold what goes there
            // (`check`) and are not in use (`Landing::push`); the marks are of the group.
            let issued = unsafe { call.plane.queue().push((peers, me), &pushed, (mark, call.plane.halt())) };
            if let Some(issued) = issued.filter(|_| beside) {
                queue.give_way(issued, PATIENCE);
            }
            Ok(())
        })
    }
}

impl<A: CudaAct> Landing<Cuda<A>> for Berths<A> {
    fn push(&self, queue: &Cuda<A>, push: &Push<'_, Cuda<A>>) -> Result<Event> {
        push.at.iter().zip(push.rows).for_each(|(at, rows)| self.check(push, *at, rows));
        let peers: Vec<_> = push.at.iter().enumerate().map(|(rank, row)| self.place(rank, *row, push)).collect();
        self.issue(queue, push, &peers, true)
    }

    fn rehearse(&self, queue: &Cuda<A>, push: &Push<'_, Cuda<A>>) -> Result<Event> {
        let me = self.link.rank();
        let start = |rows: &Range<usize>| {
            // Rows of this rank may be more than its own berth has to hold.
            let at = if rows.end * push.width <= self.room.0 { rows.start } else { 0 };
            self.check(push, at, rows);
            at
        };
        let peers: Vec<_> = push.rows.iter().map(|rows| self.place(me, start(rows), push)).collect();
        self.issue(queue, push, &peers, false)
    }
}
