//! Replays an op stream on a prefix index of NVIDIA Dynamo's KV router and prints one line of JSON, with the keys of
//! `bench_index`.
//!
//! usage: dynamo-peer radix|concurrent FILE.ops [--threads N] [--seconds S]
//!
//! `--threads N` (concurrent only): besides, a writer at full speed beside N - 1 readers.
//! `--memory` prints nothing but the index's own memory in bytes; the program calls itself so, in order that memory is
//! measured in a process that has freed nothing before.

mod concurrent;
mod measure;
mod op_stream;
mod replay;

use std::process::{Command, ExitCode};

use op_stream::OpStream;
use serde_json::{json, Map, Value};

const USAGE: &str = "usage: dynamo-peer radix|concurrent FILE.ops [--threads N] [--seconds S]";

struct Options {
    index: String,
    file: String,
    threads: usize,
    seconds: f64,
    memory: bool,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let index = args.next().filter(|name| name == "radix" || name == "concurrent").ok_or(USAGE)?;
    let file = args.next().ok_or(USAGE)?;
    let mut options = Options { index, file, threads: 1, seconds: 2.0, memory: false };
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--threads" => options.threads = value()?.parse().map_err(|error| format!("--threads: {error}"))?,
            "--seconds" => options.seconds = value()?.parse().map_err(|error| format!("--seconds: {error}"))?,
            "--memory" => options.memory = true,
            _ => return Err(format!("unknown argument {option}\n{USAGE}")),
        }
    }
    if options.threads > 1 && options.index == "radix" {
        return Err("--threads: RadixTree is for one thread only".into());
    }
    if options.threads == 0 || !(options.seconds > 0.0 && options.seconds <= 3600.0) {
        return Err("--threads must be at least 1, --seconds above 0 and at most 3600".into());
    }
    Ok(options)
}

/// The index's own memory, measured by a process of its own.
fn memory_in_child(options: &Options) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(program)
        .args([&options.index, &options.file, "--memory"])
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| format!("measuring memory failed: {}", String::from_utf8_lossy(&output.stderr)))
}

fn add_reads(out: &mut Map<String, Value>, suffix: &str, reads: &concurrent::Reads) {
    out.insert(format!("find_per_s{suffix}"), json!(reads.find_per_s.round() as u64));
    for (name, q) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)] {
        out.insert(format!("find_{name}_ns{suffix}"), json!(reads.percentile(q)));
    }
}

fn run(options: &Options) -> Result<(), String> {
    let stream = OpStream::load(&options.file)?;
    if options.memory {
        let bytes = match options.index.as_str() {
            "radix" => replay::radix_tree_memory(&stream),
            _ => replay::concurrent_tree_memory(&stream),
        };
        println!("{bytes}");
        return Ok(());
    }
    let rss_bytes = memory_in_child(options)?;
    let (name, figures) = match options.index.as_str() {
        "radix" => ("dynamo RadixTree", replay::radix_tree(stream)),
        _ => ("dynamo ConcurrentRadixTreeCompressed", replay::concurrent_tree(stream)),
    };
    let mut out = Map::new();
    out.insert("peer".into(), json!(name));
    out.insert("ops".into(), json!(options.file.rsplit('/').next()));
    out.insert("event_blocks_per_s".into(), json!(figures.event_blocks_per_s.round() as u64));
    out.insert("find_per_s".into(), json!(figures.find_per_s.round() as u64));
    out.insert("find_blocks_per_s".into(), json!(figures.find_blocks_per_s.round() as u64));
    out.insert("find_p50_ns".into(), json!(figures.percentile(0.5)));
    out.insert("find_p99_ns".into(), json!(figures.percentile(0.99)));
    out.insert("find_p999_ns".into(), json!(figures.percentile(0.999)));
    out.insert("rss_bytes".into(), json!(rss_bytes));
    out.insert("rss_bytes_consuming".into(), json!(figures.rss_bytes_consuming));
    out.insert("checksum".into(), json!(format!("{:016x}", figures.checksum)));
    out.insert("interleaved_checksum".into(), json!(format!("{:016x}", figures.interleaved_checksum)));
    let mut same_after = true;
    if options.threads > 1 {
        let stream = OpStream::load(&options.file)?;
        let beside = concurrent::run(&stream, options.threads - 1, options.seconds);
        out.insert("readers".into(), json!(options.threads - 1));
        out.insert("event_blocks_per_s_under_read".into(), json!(beside.event_blocks_per_s_under_read.round() as u64));
        add_reads(&mut out, "_quiet", &beside.quiet);
        add_reads(&mut out, "_under_write", &beside.under_write);
        same_after = beside.same_after;
    }
    println!("{}", Value::Object(out));
    // Told, not failed on: it is the peer's figure.
    if !same_after {
        eprintln!("dynamo-peer: the index answers otherwise after concurrent writing");
    }
    Ok(())
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dynamo-peer: {error}");
            ExitCode::FAILURE
        }
    }
}
