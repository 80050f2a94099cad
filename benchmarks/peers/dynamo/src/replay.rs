//! One replay of an op stream on each index, and what it costs.

use std::hint::black_box;
use std::time::Instant;

use dynamo_kv_router::indexer::{
    concurrent_radix_tree_compressed::ConcurrentRadixTreeCompressed, radix_tree::RadixTree, SyncIndexer,
    ThreadPoolIndexer,
};
use dynamo_kv_router::protocols::{LocalBlockHash, OverlapScores, RouterEvent};

use crate::measure::{add_to_checksum, percentile, resident_bytes, warm_memory};
use crate::op_stream::{event_blocks, Op, OpStream};

pub type ConcurrentIndexer = ThreadPoolIndexer<ConcurrentRadixTreeCompressed>;

/// Events between two waits for the indexer's thread, where its queue is not to grow.
const EVENTS_A_FLUSH: usize = 64;

#[derive(Default)]
pub struct Figures {
    pub event_blocks_per_s: f64,
    pub find_per_s: f64,
    pub find_blocks_per_s: f64,
    /// In nanoseconds, sorted.
    pub find_ns: Vec<u64>,
    /// Growth of resident memory while the replay consumed its events: what they free goes into the index again.
    pub rss_bytes_consuming: u64,
    pub checksum: u64,
    pub interleaved_checksum: u64,
}

impl Figures {
    pub fn percentile(&self, q: f64) -> u64 {
        percentile(&self.find_ns, q)
    }
}

pub fn concurrent_indexer(block_size: u32) -> ConcurrentIndexer {
    ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), 1, block_size)
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime of this thread")
}

/// Waits until everything that was enqueued has been applied.
pub fn flush(runtime: &tokio::runtime::Runtime, indexer: &ConcurrentIndexer) {
    runtime.block_on(indexer.flush_and_wait()).expect("the indexer's thread runs");
}

/// RadixTree, on one thread: each event is timed by itself, finds between events are answered but not timed.
pub fn radix_tree(stream: OpStream) -> Figures {
    let mut out = Figures::default();
    warm_memory();
    let before = resident_bytes();
    let mut tree = RadixTree::new();
    let (mut event_ns, mut blocks) = (0u64, 0usize);
    let mut finds = vec![];
    for op in stream.ops {
        match op {
            Op::Event(event) => {
                blocks += event_blocks(&event);
                let start = Instant::now();
                // Refuses removals of blocks it does not hold; the checksums tell whether that was right.
                let _ = tree.apply_event(event);
                event_ns += start.elapsed().as_nanos() as u64;
            }
            Op::Find(find) => {
                out.interleaved_checksum =
                    add_to_checksum(out.interleaved_checksum, &tree.find_matches(find.clone(), false));
                finds.push(find);
            }
        }
    }
    out.rss_bytes_consuming = resident_bytes().saturating_sub(before);
    out.event_blocks_per_s = blocks as f64 / (event_ns as f64 / 1e9);
    time_finds(&finds, |find| find.clone(), |query| tree.find_matches(query, false), &mut out);
    out
}

/// ConcurrentRadixTreeCompressed behind its indexer with one thread for events: they are enqueued from here and timed
/// from the first to the last one's being applied; finds go to the tree directly.
pub fn concurrent_tree(stream: OpStream) -> Figures {
    let mut out = Figures::default();
    let runtime = runtime();
    let events: Vec<RouterEvent> = events_of(&stream).cloned().collect();
    let blocks: usize = events.iter().map(event_blocks).sum();
    let finds: Vec<Vec<LocalBlockHash>> = finds_of(&stream).cloned().collect();
    let block_size = stream.block_size;

    warm_memory();
    let before = resident_bytes();
    let indexer = concurrent_indexer(block_size);
    let start = Instant::now();
    for event in events {
        indexer.enqueue_event(event).expect("the indexer's thread runs");
    }
    flush(&runtime, &indexer);
    let seconds = start.elapsed().as_secs_f64();
    out.rss_bytes_consuming = resident_bytes().saturating_sub(before);
    out.event_blocks_per_s = blocks as f64 / seconds;
    time_finds(&finds, |find| find, |query| indexer.backend().find_matches(query, false), &mut out);
    // Last, so that nothing measured runs on memory that was freed before.
    out.interleaved_checksum = interleaved_checksum(&stream, &runtime);
    out
}

/// Growth of resident memory by the index alone: the stream stays in memory, each event is a copy that lives until it
/// is applied.
pub fn radix_tree_memory(stream: &OpStream) -> u64 {
    let before = resident_bytes();
    let mut tree = RadixTree::new();
    for event in events_of(stream) {
        let _ = tree.apply_event(event.clone());
    }
    resident_bytes().saturating_sub(before)
}

pub fn concurrent_tree_memory(stream: &OpStream) -> u64 {
    let runtime = runtime();
    let before = resident_bytes();
    let indexer = concurrent_indexer(stream.block_size);
    for (i, event) in events_of(stream).enumerate() {
        indexer.enqueue_event(event.clone()).expect("the indexer's thread runs");
        if i % EVENTS_A_FLUSH == 0 {
            flush(&runtime, &indexer);
        }
    }
    flush(&runtime, &indexer);
    resident_bytes().saturating_sub(before)
}

pub fn events_of(stream: &OpStream) -> impl Iterator<Item = &RouterEvent> {
    stream.ops.iter().filter_map(|op| if let Op::Event(event) = op { Some(event) } else { None })
}

pub fn finds_of(stream: &OpStream) -> impl Iterator<Item = &Vec<LocalBlockHash>> {
    stream.ops.iter().filter_map(|op| if let Op::Find(find) = op { Some(find) } else { None })
}

fn interleaved_checksum(stream: &OpStream, runtime: &tokio::runtime::Runtime) -> u64 {
    let indexer = concurrent_indexer(stream.block_size);
    let mut sum = 0;
    for op in &stream.ops {
        match op {
            Op::Event(event) => indexer.enqueue_event(event.clone()).expect("the indexer's thread runs"),
            Op::Find(find) => {
                flush(runtime, &indexer);
                sum = add_to_checksum(sum, &indexer.backend().find_matches(find, false));
            }
        }
    }
    sum
}

/// Asks every find twice; the second round is timed, without what `prepare` does, and summed.
fn time_finds<'a, Query>(
    finds: &'a [Vec<LocalBlockHash>],
    prepare: impl Fn(&'a Vec<LocalBlockHash>) -> Query,
    find: impl Fn(Query) -> OverlapScores,
    out: &mut Figures,
) {
    for round in 0..2 {
        for blocks in finds {
            let query = prepare(blocks);
            let start = Instant::now();
            let answer = black_box(find(query));
            let ns = start.elapsed().as_nanos() as u64;
            if round == 1 {
                out.find_ns.push(ns);
                out.checksum = add_to_checksum(out.checksum, &answer);
            }
        }
    }
    let seconds = out.find_ns.iter().sum::<u64>() as f64 / 1e9;
    out.find_per_s = finds.len() as f64 / seconds;
    out.find_blocks_per_s = finds.iter().map(Vec::len).sum::<usize>() as f64 / seconds;
    out.find_ns.sort_unstable();
}
