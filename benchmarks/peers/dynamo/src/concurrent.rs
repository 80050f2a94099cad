//! A writer at full speed beside readers, on ConcurrentRadixTreeCompressed: the counterpart of `bench_index --threads`.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use dynamo_kv_router::indexer::SyncIndexer;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEventData, KvCacheRemoveData, LocalBlockHash, RouterEvent,
};

use crate::measure::{add_to_checksum, percentile, pin_to_core, usable_cores};
use crate::op_stream::{event, event_blocks, OpStream};
use crate::replay::{concurrent_indexer, events_of, finds_of, flush, runtime, ConcurrentIndexer};

const BLOCKS_A_REMOVAL: usize = 64;
const TURNS: u32 = 4;

const QUIET: u8 = 0;
const UNDER_WRITE: u8 = 1;
const END: u8 = 2;

/// What the threads agree on.  `kind` changes only between the barrier at a phase's end and the one at the next one's
/// beginning; a phase lasts while `running`.
struct Phase {
    kind: AtomicU8,
    running: AtomicBool,
    barrier: Barrier,
}

impl Phase {
    fn run(&self, kind: u8, work: &mut dyn FnMut()) {
        self.kind.store(kind, Ordering::SeqCst);
        self.running.store(true, Ordering::SeqCst);
        self.barrier.wait();
        work();
        self.running.store(false, Ordering::SeqCst);
        self.barrier.wait();
    }

    fn end(&self) {
        self.kind.store(END, Ordering::SeqCst);
        self.barrier.wait();
    }
}

/// Finds of all readers in one kind of phase.
#[derive(Default)]
pub struct Reads {
    /// In nanoseconds, sorted.
    pub find_ns: Vec<u64>,
    pub find_per_s: f64,
}

impl Reads {
    pub fn percentile(&self, q: f64) -> u64 {
        percentile(&self.find_ns, q)
    }
}

pub struct Figures {
    pub quiet: Reads,
    pub under_write: Reads,
    pub event_blocks_per_s_under_read: f64,
    /// The index answers as before the writer came.
    pub same_after: bool,
}

/// Readers and writer have a core each, where there are as many; who enqueues the events shares the writer's.  The
/// events of a round are copied while readers pause.
pub fn run(stream: &OpStream, readers: usize, seconds: f64) -> Figures {
    let cores = usable_cores();
    pin_to_core(&cores, 0); // the indexer's thread inherits it
    let runtime = runtime();
    let indexer = concurrent_indexer(stream.block_size);
    for event in events_of(stream) {
        indexer.enqueue_event(event.clone()).expect("the indexer's thread runs");
    }
    flush(&runtime, &indexer);
    let finds: Vec<&Vec<LocalBlockHash>> = finds_of(stream).collect();
    let checksum = checksum_of(&indexer, &finds);
    let round = writer_round(stream);
    let blocks_a_round: usize = round.iter().map(event_blocks).sum();

    let phase =
        Phase { kind: AtomicU8::new(QUIET), running: AtomicBool::new(false), barrier: Barrier::new(readers + 1) };
    let turn = Duration::from_secs_f64(seconds / f64::from(TURNS));
    let (mut blocks, mut write_time) = (0usize, Duration::ZERO);
    let results: Vec<[Timed; 2]> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..readers)
            .map(|i| {
                let (indexer, finds, phase, cores) = (&indexer, &finds, &phase, &cores);
                scope.spawn(move || {
                    pin_to_core(cores, i + 1);
                    read(indexer, finds, i * finds.len() / readers, phase)
                })
            })
            .collect();
        for _ in 0..TURNS {
            phase.run(QUIET, &mut || std::thread::sleep(turn));
            let before_turn = write_time;
            while write_time - before_turn < turn {
                let mut events = Some(round.clone());
                phase.run(UNDER_WRITE, &mut || {
                    let start = Instant::now();
                    for event in events.take().into_iter().flatten() {
                        indexer.enqueue_event(event).expect("the indexer's thread runs");
                    }
                    flush(&runtime, &indexer);
                    write_time += start.elapsed();
                });
                blocks += blocks_a_round;
            }
        }
        phase.end();
        threads.into_iter().map(|thread| thread.join().expect("a reader ends well")).collect()
    });

    let [quiet, under_write] = [0, 1].map(|kind| merged(results.iter().map(|result| &result[kind])));
    Figures {
        quiet,
        under_write,
        event_blocks_per_s_under_read: blocks as f64 / write_time.as_secs_f64(),
        same_after: checksum_of(&indexer, &finds) == checksum,
    }
}

#[derive(Default)]
struct Timed {
    find_ns: Vec<u64>,
    time: Duration,
}

fn merged<'a>(of_readers: impl Iterator<Item = &'a Timed>) -> Reads {
    let mut out = Reads::default();
    for timed in of_readers {
        out.find_ns.extend(&timed.find_ns);
        out.find_per_s += timed.find_ns.len() as f64 / timed.time.as_secs_f64();
    }
    out.find_ns.sort_unstable();
    out
}

/// Asks the finds round after round in the phases that are measured; returns what was measured quiet and beside the
/// writer.
fn read(indexer: &ConcurrentIndexer, finds: &[&Vec<LocalBlockHash>], first: usize, phase: &Phase) -> [Timed; 2] {
    let mut out = [Timed::default(), Timed::default()];
    let mut at = first;
    for find in finds {
        black_box(indexer.backend().find_matches(find, false));
    }
    loop {
        phase.barrier.wait();
        let kind = phase.kind.load(Ordering::SeqCst);
        if kind == END {
            return out;
        }
        let timed = &mut out[usize::from(kind)];
        let begin = Instant::now();
        while phase.running.load(Ordering::Relaxed) {
            let start = Instant::now();
            let answer = black_box(indexer.backend().find_matches(finds[at], false));
            timed.find_ns.push(start.elapsed().as_nanos() as u64);
            drop(answer);
            at = (at + 1) % finds.len();
        }
        timed.time += begin.elapsed();
        phase.barrier.wait();
    }
}

/// Worker by worker: removes what it holds at the end of the stream, the last blocks first, then all its events.
fn writer_round(stream: &OpStream) -> Vec<RouterEvent> {
    let mut by_worker: BTreeMap<u64, Vec<&RouterEvent>> = BTreeMap::new();
    for event in events_of(stream) {
        by_worker.entry(event.worker_id).or_default().push(event);
    }
    let mut round = vec![];
    for (worker, events) in by_worker {
        for hashes in held_at_end(&events).chunks(BLOCKS_A_REMOVAL) {
            let data = KvCacheEventData::Removed(KvCacheRemoveData { block_hashes: hashes.to_vec() });
            round.push(event(worker, round.len() as u64, data));
        }
        round.extend(events.into_iter().cloned());
    }
    round
}

/// The blocks that a worker's events leave it with, the one stored last first.
fn held_at_end(events: &[&RouterEvent]) -> Vec<ExternalSequenceBlockHash> {
    let mut stored_at: HashMap<ExternalSequenceBlockHash, usize> = HashMap::new();
    let mut clock = 0;
    for event in events {
        match &event.event.data {
            KvCacheEventData::Stored(stored) => {
                for block in &stored.blocks {
                    clock += 1;
                    stored_at.entry(block.block_hash).or_insert(clock);
                }
            }
            KvCacheEventData::Removed(removed) => removed.block_hashes.iter().for_each(|hash| {
                stored_at.remove(hash);
            }),
            KvCacheEventData::Cleared => stored_at.clear(),
        }
    }
    let mut held: Vec<_> = stored_at.into_iter().collect();
    held.sort_unstable_by_key(|(_, when)| std::cmp::Reverse(*when));
    held.into_iter().map(|(hash, _)| hash).collect()
}

fn checksum_of(indexer: &ConcurrentIndexer, finds: &[&Vec<LocalBlockHash>]) -> u64 {
    finds.iter().fold(0, |sum, find| add_to_checksum(sum, &indexer.backend().find_matches(find, false)))
}
