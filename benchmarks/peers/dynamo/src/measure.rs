//! What is measured with: resident memory, percentiles, cores, the checksum of answers.

use dynamo_kv_router::protocols::OverlapScores;

/// Resident memory of this process in bytes, as /proc/self/statm has it.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf only reads.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64
}

/// Uses half a gigabyte and gives it back to the system.  On a virtual machine, memory that the host has taken back costs
/// several times as much at first touch as other memory; which one a program gets is chance.  After this it is other.
pub fn warm_memory() {
    const BYTES: usize = 512 << 20;
    // SAFETY: the memory is this function's own, and used only between mmap and munmap.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = libc::mmap(std::ptr::null_mut(), BYTES, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        if memory == libc::MAP_FAILED {
            return;
        }
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
            libc::madvise(memory, BYTES, advice); // the system keeps them apart
            memory.write_bytes(1, BYTES);
            libc::madvise(memory, BYTES, libc::MADV_DONTNEED);
        }
        libc::munmap(memory, BYTES);
    }
}

/// The value at rank floor((n - 1) * q) of sorted values; 0 if there are none.
pub fn percentile(sorted: &[u64], q: f64) -> u64 {
    sorted.get(((sorted.len().max(1) - 1) as f64 * q) as usize).copied().unwrap_or(0)
}

/// Adds one find's answer to a running checksum: FNV-1a over (worker, overlap) of the workers that hold something, in
/// the order of their numbers, rotated in.
pub fn add_to_checksum(sum: u64, answer: &OverlapScores) -> u64 {
    let mut held: Vec<(u64, u64)> =
        answer.scores.iter().filter(|(_, n)| **n > 0).map(|(worker, n)| (worker.worker_id, u64::from(*n))).collect();
    held.sort_unstable();
    let step = |hash: u64, value: u64| (hash ^ value).wrapping_mul(0x100_0000_01b3);
    let hash = held.iter().fold(0xcbf2_9ce4_8422_2325, |hash, (worker, n)| step(step(hash, *worker), *n));
    sum.rotate_left(1) ^ hash
}

/// The cores this process may use.
pub fn usable_cores() -> Vec<usize> {
    // SAFETY: the set is plain data of the size that is given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, std::mem::size_of_val(&set), &mut set) != 0 {
            return vec![];
        }
        (0..libc::CPU_SETSIZE as usize).filter(|core| libc::CPU_ISSET(*core, &set)).collect()
    }
}

/// Puts the calling thread, and the threads it starts from now on, on one of `cores`: the `number`th, in turn.
pub fn pin_to_core(cores: &[usize], number: usize) {
    if cores.is_empty() {
        return;
    }
    // SAFETY: as above.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cores[number % cores.len()], &mut set);
        libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set);
    }
}
