//! Op streams, as benchmarks/make_ops.py writes them (the format is described there), in Dynamo's own types.

use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};

pub enum Op {
    Event(RouterEvent),
    Find(Vec<LocalBlockHash>),
}

pub struct OpStream {
    pub block_size: u32,
    pub ops: Vec<Op>,
}

/// Blocks that an event stores or removes.
pub fn event_blocks(event: &RouterEvent) -> usize {
    match &event.event.data {
        KvCacheEventData::Stored(stored) => stored.blocks.len(),
        KvCacheEventData::Removed(removed) => removed.block_hashes.len(),
        KvCacheEventData::Cleared => 0,
    }
}

pub fn event(worker: u64, id: u64, data: KvCacheEventData) -> RouterEvent {
    RouterEvent::new(worker, KvCacheEvent { event_id: id, data, dp_rank: 0 })
}

impl OpStream {
    pub fn load(path: &str) -> Result<OpStream, String> {
        let data = std::fs::read(path).map_err(|error| format!("cannot read {path}: {error}"))?;
        let mut reader = Reader { data: &data, at: 0 };
        if reader.take(8) != Some(b"KVOP1\0\0\0") {
            return Err(format!("{path} is no op stream (make one with benchmarks/make_ops.py)"));
        }
        read_ops(&mut reader).ok_or_else(|| format!("{path} is broken off at byte {}", reader.at))
    }
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Option<&'a [u8]> {
        let bytes = self.data.get(self.at..self.at.checked_add(size)?)?;
        self.at += size;
        Some(bytes)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

fn read_ops(reader: &mut Reader) -> Option<OpStream> {
    let block_size = reader.u32()?;
    let _num_workers = reader.u32()?;
    let count = reader.u64()?;
    let ops = (0..count).map(|id| read_op(reader, id)).collect::<Option<Vec<Op>>>()?;
    Some(OpStream { block_size, ops })
}

fn read_op(reader: &mut Reader, id: u64) -> Option<Op> {
    let kind = reader.u8()?;
    let worker = u64::from(reader.u32()?);
    let count = reader.u32()? as usize;
    let data = match kind {
        1 => {
            let has_parent = reader.u8()? != 0;
            let parent = reader.u64()?;
            let block = |reader: &mut Reader| {
                Some(KvCacheStoredBlockData {
                    tokens_hash: LocalBlockHash(reader.u64()?),
                    block_hash: ExternalSequenceBlockHash(reader.u64()?),
                    mm_extra_info: None,
                })
            };
            KvCacheEventData::Stored(KvCacheStoreData {
                parent_hash: has_parent.then_some(ExternalSequenceBlockHash(parent)),
                start_position: None,
                blocks: (0..count).map(|_| block(reader)).collect::<Option<Vec<_>>>()?,
            })
        }
        2 => KvCacheEventData::Removed(KvCacheRemoveData {
            block_hashes: (0..count)
                .map(|_| reader.u64().map(ExternalSequenceBlockHash))
                .collect::<Option<Vec<_>>>()?,
        }),
        3 => return (0..count).map(|_| reader.u64().map(LocalBlockHash)).collect::<Option<Vec<_>>>().map(Op::Find),
        4 => KvCacheEventData::Cleared,
        _ => return None,
    };
    Some(Op::Event(event(worker, id, data)))
}
