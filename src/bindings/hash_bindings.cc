// Block hashes, the prefix index and the event decoder, as kvrouter._core shows them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "kvrouter/kv_event.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter::python {
namespace {

std::size_t checked_block_size(std::int64_t block_size) {
  if (block_size <= 0) {
    throw nb::value_error(("block_size must be at least 1, got " + std::to_string(block_size)).c_str());
  }
  return static_cast<std::size_t>(block_size);
}

void add_key(NamespaceBuilder& builder, nb::handle key, int depth) {
  if (key.is_none()) {
    builder.add_null();
  } else if (nb::isinstance<nb::str>(key)) {
    builder.add_string(nb::cast<std::string>(key));
  } else if (nb::isinstance<nb::bytes>(key)) {
    const auto bytes = nb::borrow<nb::bytes>(key);
    builder.add_bytes({bytes.c_str(), bytes.size()});
  } else if (nb::isinstance<nb::int_>(key)) {
    builder.add_int(nb::cast<std::int64_t>(key));
  } else if (nb::isinstance<nb::float_>(key)) {
    builder.add_float(nb::cast<double>(key));
  } else if (depth < 8 && (nb::isinstance<nb::list>(key) || nb::isinstance<nb::tuple>(key))) {
    builder.begin_list(nb::len(key));
    for (nb::handle item : key) add_key(builder, item, depth + 1);
  } else {
    throw nb::type_error("extra_keys may hold strings, bytes, numbers, None, and lists or tuples of these");
  }
}

// One namespace a block; the LoRA name, when it leads an entry (as in vLLM's events), counts once.
std::vector<NamespaceHash> namespaces(const std::optional<std::string>& lora_name, nb::handle extra_keys,
                                      std::size_t num_blocks) {
  const NamespaceHash base = lora_name ? lora_namespace(*lora_name) : 0;
  std::vector<NamespaceHash> result(num_blocks, base);
  if (extra_keys.is_none()) return result;
  if (nb::len(extra_keys) != num_blocks) {
    throw nb::value_error(("extra_keys must have one entry for each of the " + std::to_string(num_blocks) +
                           " full blocks, got " + std::to_string(nb::len(extra_keys)))
                              .c_str());
  }
  std::size_t block = 0;
  for (nb::handle entry : extra_keys) {
    NamespaceHash& ns = result[block++];
    if (entry.is_none()) continue;
    if (!nb::isinstance<nb::list>(entry) && !nb::isinstance<nb::tuple>(entry)) {
      throw nb::type_error("each entry of extra_keys must be None, a list or a tuple");
    }
    NamespaceBuilder builder(base);
    bool first = true;
    for (nb::handle key : entry) {
      const bool is_lora =
          first && lora_name && nb::isinstance<nb::str>(key) && nb::cast<std::string>(key) == *lora_name;
      first = false;
      if (!is_lora) add_key(builder, key, 0);
    }
    ns = builder.finish();
  }
  return result;
}

std::vector<LocalHash> hashes_of(nb::handle tokens, std::int64_t block_size,
                                 const std::optional<std::string>& lora_name, nb::handle extra_keys) {
  const std::size_t size = checked_block_size(block_size);
  const TokenView view(tokens);
  std::vector<LocalHash> hashes(view.span().size() / size);
  const std::vector<NamespaceHash> ns =
      extra_keys.is_none() ? std::vector<NamespaceHash>{} : namespaces(lora_name, extra_keys, hashes.size());
  const NamespaceHash base = lora_name ? lora_namespace(*lora_name) : 0;
  const nb::gil_scoped_release release;
  if (ns.empty()) {
    hash_blocks(view.span(), size, base, hashes);
  } else {
    for (std::size_t i = 0; i < hashes.size(); ++i) hashes[i] = hash_block(view.span().subspan(i * size, size), ns[i]);
  }
  return hashes;
}

using EventList = nb::typed<nb::list, nb::typed<nb::tuple, nb::any, nb::ellipsis>>;

// Collects events as tuples: ("stored", parent, [(local, engine)...]), ("removed", [engine...]), ("cleared",).
class ListSink final : public KvEventSink {
 public:
  nb::list events;

  void on_stored(std::optional<EngineHash> parent, std::span<const StoredBlock> blocks) override {
    nb::list list;
    for (const StoredBlock& block : blocks) list.append(nb::make_tuple(block.local, block.engine));
    events.append(nb::make_tuple("stored", parent, list));
  }
  void on_removed(std::span<const EngineHash> blocks) override {
    nb::list list;
    for (const EngineHash block : blocks) list.append(block);
    events.append(nb::make_tuple("removed", list));
  }
  void on_cleared() override { events.append(nb::make_tuple("cleared")); }
};

nb::typed<nb::dict, nb::str, nb::int_> as_dict(const KvEventCounts& counts) {
  nb::dict d;
  d["batches"] = counts.batches;
  d["stored_blocks"] = counts.stored_blocks;
  d["removed_blocks"] = counts.removed_blocks;
  d["cleared"] = counts.cleared;
  d["skipped_unknown_type"] = counts.skipped_unknown_type;
  d["skipped_unknown_field"] = counts.skipped_unknown_field;
  d["skipped_block_size"] = counts.skipped_block_size;
  d["skipped_group"] = counts.skipped_group;
  d["skipped_medium"] = counts.skipped_medium;
  d["skipped_invalid"] = counts.skipped_invalid;
  d["malformed_batches"] = counts.malformed_batches;
  return d;
}

void bind_index(nb::module_& m) {
  nb::class_<PrefixIndex>(m, "PrefixIndex", "Which worker holds which prefix: see include/kvrouter/prefix_index.h.")
      .def(
          "__init__",
          [](PrefixIndex* self, std::int64_t num_workers) {
            if (num_workers < 1) throw nb::value_error("num_workers must be at least 1");
            new (self) PrefixIndex(static_cast<std::size_t>(num_workers));
          },
          nb::arg("num_workers"))
      .def_prop_ro("num_workers", &PrefixIndex::num_workers)
      .def(
          "store",
          [](PrefixIndex& self, std::int64_t worker, std::optional<EngineHash> parent, nb::handle local_hashes,
             nb::handle engine_hashes) {
            const HashView local(local_hashes, "local_hashes"), engine(engine_hashes, "engine_hashes");
            if (local.span().size() != engine.span().size()) {
              throw nb::value_error("local_hashes and engine_hashes must have the same length");
            }
            std::vector<StoredBlock> blocks(local.span().size());
            for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = {local.span()[i], engine.span()[i]};
            self.store(checked_worker(self.num_workers(), worker), parent, blocks);
          },
          nb::arg("worker"), nb::arg("parent").none(), nb::arg("local_hashes"), nb::arg("engine_hashes"),
          "`worker` holds this chain of blocks, which follows its block `parent` (None: starts a sequence).")
      .def(
          "remove",
          [](PrefixIndex& self, std::int64_t worker, nb::handle engine_hashes) {
            self.remove(checked_worker(self.num_workers(), worker), HashView(engine_hashes, "engine_hashes").span());
          },
          nb::arg("worker"), nb::arg("engine_hashes"))
      .def(
          "clear",
          [](PrefixIndex& self, std::int64_t worker) { self.clear(checked_worker(self.num_workers(), worker)); },
          nb::arg("worker"))
      .def(
          "worker_blocks",
          [](const PrefixIndex& self, std::int64_t worker) {
            const WorkerId id = checked_worker(self.num_workers(), worker);
            std::vector<EngineHash> blocks;
            {
              const nb::gil_scoped_release release;
              blocks = self.worker_blocks(id);
            }
            return to_numpy(std::move(blocks));
          },
          nb::arg("worker"),
          "The names (engine hashes) of the blocks that `worker` holds, ascending, orphans included: uint64, (n,).  "
          "For tests and debugging: it looks at the whole index.")
      .def(
          "find_matches",
          [](const PrefixIndex& self, nb::handle local_hashes) {
            const HashView hashes(local_hashes, "local_hashes");
            std::vector<std::uint32_t> overlap(self.num_workers());
            {
              const nb::gil_scoped_release release;
              self.find_matches(hashes.span(), overlap);
            }
            return to_numpy(std::move(overlap));
          },
          nb::arg("local_hashes"), "For each worker the number of leading blocks it holds: uint32, (num_workers,).");
}

}  // namespace

void bind_hashes(nb::module_& m) {
  m.def(
      "compute_block_hashes",
      [](nb::handle tokens, std::int64_t block_size, const std::optional<std::string>& lora_name,
         nb::handle extra_keys) { return to_numpy(hashes_of(tokens, block_size, lora_name, extra_keys)); },
      nb::arg("tokens"), nb::arg("block_size") = 64, nb::kw_only(), nb::arg("lora_name") = nb::none(),
      nb::arg("extra_keys") = nb::none(),
      "Hashes of the full blocks of a token sequence.\n\n"
      "tokens: list, or 1-D integer array or CPU tensor, (num_tokens,); ids from 0 to 2^32 - 1.\n"
      "block_size: tokens a block.\n"
      "lora_name: the adapter, if any.\n"
      "extra_keys: one entry a full block, each None or a tuple, as in vLLM's KV events (cache salt, multimodal\n"
      "items...).\n"
      "Returns uint64, (num_tokens // block_size,): XXH3-64 with seed 1337 over the little-endian 32-bit ids.\n"
      "Raises ValueError for an id out of range or a block size below 1, TypeError for another kind of sequence.");
  const auto for_seq = [](nb::handle tokens, std::int64_t kv_block_size, const std::optional<std::string>& lora_name) {
    return hashes_of(tokens, kv_block_size, lora_name, nb::none());
  };
  m.def("compute_block_hash_for_seq", for_seq, nb::arg("tokens"), nb::arg("kv_block_size"), nb::kw_only(),
        nb::arg("lora_name") = nb::none(),
        "The same as a list of integers, under the name and with the arguments that Dynamo's runtime gives it.");
  m.def("compute_block_hash_for_seq_py", for_seq, nb::arg("tokens"), nb::arg("kv_block_size"), nb::kw_only(),
        nb::arg("lora_name") = nb::none(), "compute_block_hash_for_seq under its older name.");

  nb::class_<KvEventDecoder>(m, "KvEventDecoder", "Decodes the KV-event batches of one worker (MessagePack).")
      .def(
          "__init__",
          [](KvEventDecoder* self, std::int64_t block_size) {
            new (self) KvEventDecoder(checked_block_size(block_size));
          },
          nb::arg("block_size") = 64)
      .def(
          "decode",
          [](KvEventDecoder& self, nb::bytes payload) {
            ListSink sink;
            const DecodeResult result =
                self.decode({reinterpret_cast<const std::byte*>(payload.c_str()), payload.size()}, sink);
            return std::pair(EventList(sink.events), result.ok ? std::nullopt : std::optional(result.error));
          },
          nb::arg("payload"),
          "Returns (events, error): the events read, each ('stored', parent, [(local, engine), ...]),\n"
          "('removed', [engine, ...]) or ('cleared',); and None, or what made the batch unreadable from there on.")
      .def_prop_ro("counts", [](const KvEventDecoder& self) { return as_dict(self.counts()); })
      .def_prop_ro("mismatched_block_size", &KvEventDecoder::mismatched_block_size);
  bind_index(m);
}

}  // namespace kvrouter::python
