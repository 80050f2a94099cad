#include "server/tokenizer.h"

#include "server/json_reader.h"

namespace kvrouter {
namespace {

TokenIds parse_tokens(const std::string& body) {
  simdjson::dom::object message;
  if (!parse_json_object(body, "the answer", message).empty()) return nullptr;
  const auto tokens = json_field(message, "tokens");
  simdjson::dom::array list;
  if (!tokens || tokens->get(list) != simdjson::SUCCESS) return nullptr;
  auto ids = std::make_shared<std::vector<TokenId>>();
  return read_token_ids(list, *ids) ? ids : nullptr;
}

}  // namespace

std::shared_ptr<UpstreamCall> Tokenizer::tokenize(const std::string& model, const std::string& body,
                                                  std::function<void(TokenIds)> done) {
  if (TokenIds ids = cache_.find(body)) {
    done(std::move(ids));
    return nullptr;
  }
  std::vector<std::uint8_t> eligible;
  const auto availability = fleet_.eligible(model, std::nullopt, eligible);
  FleetWorker* idlest = nullptr;
  for (WorkerId w = 0; availability == Fleet::Availability::kSome && w < eligible.size(); ++w) {
    FleetWorker& worker = fleet_.worker(w);
    if (eligible[w] && (!idlest || worker.in_flight < idlest->in_flight)) idlest = &worker;
  }
  if (!idlest) {
    done(nullptr);
    return nullptr;
  }
  return idlest->pool->post_json("/tokenize", body,
                                 [this, body, done = std::move(done)](unsigned status, const std::string& answer) {
                                   TokenIds ids = status == 200 ? parse_tokens(answer) : nullptr;
                                   if (ids) {
                                     cache_.insert(body, ids);
                                   } else {
                                     ++failures_;
                                   }
                                   done(std::move(ids));
                                 });
}

}  // namespace kvrouter
