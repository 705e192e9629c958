//! Ranks as processes without MPI: messages over a TCP connection for each pair.
//!
//! Owns the connections and the threads that read and write them. It is for what ranks agree on: configuration, text, checkpoints'
//! manifests; gradients and tokens go faster over MPI or between GPUs. It never decides who is in the world: addresses and the secret by
//! which a rank knows another come from the coordinator, at which only who has the join token may ask.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::exchange::{Worker, lock};
use super::post::{Letter, Posts};
use super::transport::{Parcel, Pool, Tag, Ticket, Transport, TransportError};
use super::{Context, HostCommunicator};
use crate::exit::{Classified, ExitCode};

/// What ranks show each other.
pub const SECRET_BYTES: usize = 16;
/// The longest message: more than any checkpoint's manifest or text segment, less than what a broken length would claim.
const MOST_BYTES: u64 = 1 << 34;
/// How long a write may take that its peer does not read, and with it the end of a transport.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long who connects may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// Between two attempts, and two looks for who connects.
const PAUSE: Duration = Duration::from_millis(20);

/// Why ranks could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No port to listen at.
    #[error("cannot listen for the other ranks: {0}")]
    Listen(#[source] io::Error),
    /// A rank that is not reached.
    #[error("rank {rank} does not answer at {addr}: {reason}; can the machines reach each other's ports?")]
    Unreachable {
        /// The rank.
        rank: usize,
        /// Where it said it would be.
        addr: String,
        /// The last attempt's error.
        reason: io::Error,
    },
    /// A rank that does not connect.
    #[error("ranks {missing:?} did not connect within {} s; can the machines reach each other's ports?", waited.as_secs())]
    Missing {
        /// The ranks.
        missing: Vec<usize>,
        /// How long it was waited for them.
        waited: Duration,
    },
    /// A thread could not be started, or a socket not be set up.
    #[error("cannot set up the connection with rank {rank}: {reason}")]
    Setup {
        /// The rank.
        rank: usize,
        /// Why not.
        reason: io::Error,
    },
}

impl Classified for ConnectError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unreachable { .. } | Self::Missing { .. } => ExitCode::Temporary,
            Self::Listen(_) | Self::Setup { .. } => ExitCode::Io,
        }
    }
}

/// This rank's end, before it is connected: others find it at [`Door::port`].
#[derive(Debug)]
pub struct Door(TcpListener);

impl Door {
    /// Opens a free port on all interfaces.
    ///
    /// # Errors
    /// [`ConnectError::Listen`].
    pub fn open() -> Result<Self, ConnectError> {
        // A machine without IPv6 has the other kind.
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).or_else(|_| TcpListener::bind(("0.0.0.0", 0)));
        let listener = listener.map_err(ConnectError::Listen)?;
        listener.set_nonblocking(true).map_err(ConnectError::Listen)?;
        Ok(Self(listener))
    }

    /// The port.
    ///
    /// # Errors
    /// [`ConnectError::Listen`].
    pub fn port(&self) -> Result<u16, ConnectError> {
        Ok(self.0.local_addr().map_err(ConnectError::Listen)?.port())
    }

    /// Connects rank `rank` with all others, which are at `addrs`, within `deadline`: with those before it by asking, with those after it
    /// by answering. Who does not know the `secret` is not answered.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(
        self,
        context: Context,
        rank: usize,
        addrs: &[String],
        secret: [u8; SECRET_BYTES],
        deadline: Duration,
    ) -> Result<HostCommunicator, ConnectError> {
        let began = Instant::now();
        let mut streams = Vec::new();
        streams.resize_with(addrs.len(), || None);
        for (peer, addr) in addrs.iter().enumerate().take(rank) {
            streams[peer] = Some(ask(rank, (peer, addr), secret, began + deadline)?);
        }
        while streams.iter().enumerate().any(|(peer, stream)| peer > rank && stream.is_none()) {
            match self.0.accept() {
                Ok((stream, _)) => {
                    if let Some(peer) = greeted(&stream, secret).filter(|peer| (rank + 1..addrs.len()).contains(peer)) {
                        streams[peer] = Some(stream);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
                Err(error) => return Err(ConnectError::Listen(error)),
            }
            if began.elapsed() >= deadline {
                let absent =
                    |(peer, stream): (usize, &Option<TcpStream>)| (peer > rank && stream.is_none()).then_some(peer);
                let missing = streams.iter().enumerate().filter_map(absent).collect();
                return Err(ConnectError::Missing { missing, waited: deadline });
            }
        }
        let inbox = Arc::new(Inbox { letters: Mutex::default(), ends: Mutex::new(vec![None; addrs.len()]) });
        let mut lines = Vec::new();
        for (peer, stream) in streams.into_iter().enumerate() {
            let line = stream.map(|stream| Line::start(peer, stream, &inbox));
            lines.push(line.transpose().map_err(|reason| ConnectError::Setup { rank: peer, reason })?);
        }
        let wire = Wire { rank, inbox, lines, posts: Posts::default() };
        let worker = Worker::new(Box::new(wire), context);
        Ok(HostCommunicator::world(Arc::new(worker), rank, addrs.len()))
    }
}

/// Asks rank `peer` for a connection until it answers.
fn ask(
    rank: usize,
    (peer, addr): (usize, &String),
    secret: [u8; SECRET_BYTES],
    until: Instant,
) -> Result<TcpStream, ConnectError> {
    let attempt = || -> io::Result<TcpStream> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for place in addr.to_socket_addrs()? {
            let left = until.saturating_duration_since(Instant::now()).max(PAUSE);
            match TcpStream::connect_timeout(&place, left) {
                Ok(mut stream) => {
                    stream.write_all(&secret)?;
                    stream.write_all(&(rank as u32).to_le_bytes())?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    loop {
        match attempt() {
            Ok(stream) => return Ok(stream),
            Err(reason) if Instant::now() >= until => {
                return Err(ConnectError::Unreachable { rank: peer, addr: addr.clone(), reason });
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// The rank at the other end, if it knows the secret.
fn greeted(mut stream: &TcpStream, secret: [u8; SECRET_BYTES]) -> Option<usize> {
    let (mut shown, mut rank) = ([0; SECRET_BYTES], [0; 4]);
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(GREETING)).ok()?;
    stream.read_exact(&mut shown).ok()?;
    stream.read_exact(&mut rank).ok()?;
    stream.set_read_timeout(None).ok()?;
    (shown == secret).then_some(u32::from_le_bytes(rank) as usize)
}

/// What readers have brought.
struct Inbox {
    letters: Mutex<Vec<Letter>>,
    /// Why nothing more comes from a rank; set after its last letter.
    ends: Mutex<Vec<Option<String>>>,
}

/// The connection with one peer.
struct Line {
    stream: TcpStream,
    outgoing: Option<Sender<(Tag, Arc<Parcel>)>>,
    threads: Vec<JoinHandle<()>>,
}

impl Line {
    fn start(peer: usize, stream: TcpStream, inbox: &Arc<Inbox>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let (outgoing, queue) = channel();
        let (writing, reading, inbox) = (stream.try_clone()?, stream.try_clone()?, Arc::clone(inbox));
        let ends = Arc::clone(&inbox);
        let writer = std::thread::Builder::new().name(format!("to-rank-{peer}")).spawn(move || {
            if let Err(error) = write_all(writing, &queue) {
                lock(&ends.ends)[peer].get_or_insert(format!("its connection broke: {error}"));
            }
        })?;
        let reader = std::thread::Builder::new().name(format!("from-rank-{peer}")).spawn(move || {
            let error = read_all(peer, reading, &inbox);
            let reason = match error.kind() {
                io::ErrorKind::UnexpectedEof => "its process has ended".to_owned(),
                _ => format!("its connection broke: {error}"),
            };
            lock(&inbox.ends)[peer].get_or_insert(reason);
        })?;
        Ok(Self { stream, outgoing: Some(outgoing), threads: vec![writer, reader] })
    }
}

/// A frame: tag (4 bytes), length (8), both little-endian, then the bytes.
fn write_all(stream: TcpStream, queue: &Receiver<(Tag, Arc<Parcel>)>) -> io::Result<()> {
    let mut stream = BufWriter::new(stream);
    while let Ok((tag, parcel)) = queue.recv() {
        stream.write_all(&tag.value().to_le_bytes())?;
        stream.write_all(&(parcel.bytes().len() as u64).to_le_bytes())?;
        stream.write_all(parcel.bytes())?;
        stream.flush()?;
    }
    Ok(())
}

/// Reads frames until there are no more, and says why.
fn read_all(from: usize, stream: TcpStream, inbox: &Inbox) -> io::Error {
    let mut stream = BufReader::new(stream);
    let mut next = || -> io::Result<Letter> {
        let (mut tag, mut len) = ([0; 4], [0; 8]);
        stream.read_exact(&mut tag)?;
        stream.read_exact(&mut len)?;
        let len = u64::from_le_bytes(len);
        if len > MOST_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {len} bytes")));
        }
        let mut bytes = Vec::new();
        stream.by_ref().take(len).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Letter { from, tag: u32::from_le_bytes(tag), parcel: Arc::new(Parcel::of(bytes)) })
    };
    loop {
        match next() {
            Ok(letter) => lock(&inbox.letters).push(letter),
            Err(error) => return error,
        }
    }
}

/// One rank's connections.
struct Wire {
    rank: usize,
    inbox: Arc<Inbox>,
    /// By rank; none for this one.
    lines: Vec<Option<Line>>,
    posts: Posts,
}

impl Transport for Wire {
    fn send(&mut self, to: usize, tag: Tag, parcel: Arc<Parcel>) -> Result<Ticket, TransportError> {
        if to == self.rank {
            lock(&self.inbox.letters).push(Letter { from: to, tag: tag.value(), parcel: Arc::clone(&parcel) });
        } else if let Some(outgoing) = self.lines[to].as_ref().and_then(|line| line.outgoing.as_ref()) {
            // A writer that has ended has said why; whoever waits for the peer hears it.
            let _ = outgoing.send((tag, Arc::clone(&parcel)));
        }
        Ok(self.posts.sent(parcel))
    }

    fn receive(&mut self, from: usize, tag: Tag, _: usize, _: &mut Pool) -> Result<Ticket, TransportError> {
        Ok(self.posts.awaited(from, tag))
    }

    fn poll(&mut self, ticket: Ticket) -> Result<Option<Arc<Parcel>>, TransportError> {
        self.posts.poll(ticket, &self.inbox.letters, |from| lock(&self.inbox.ends)[from].clone())
    }

    fn abandon(&mut self, ticket: Ticket) {
        self.posts.abandon(ticket);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // What was sent before leaving still arrives: writers end when they have written all.
        for line in self.lines.iter_mut().flatten() {
            line.outgoing = None;
        }
        for line in self.lines.iter_mut().flatten() {
            let mut threads = line.threads.drain(..);
            // A panic was printed by its thread.
            let _ = threads.next().map(JoinHandle::join);
            // The reader waits for bytes that nobody wants any more.
            let _ = line.stream.shutdown(Shutdown::Both);
            let _ = threads.next().map(JoinHandle::join);
        }
    }
}
