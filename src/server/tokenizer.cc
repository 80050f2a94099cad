#include "server/tokenizer.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "server/json_body.h"

namespace kvrouter {
namespace {

TokenIds parse_tokens(const std::string& body) {
  const auto message = parse_json(body);
  if (!message.is_object()) return nullptr;
  const auto tokens = message.find("tokens");
  if (tokens == message.end() || !tokens->is_array()) return nullptr;
  auto ids = std::make_shared<std::vector<TokenId>>();
  ids->reserve(tokens->size());
  for (const auto& id : *tokens) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > std::numeric_limits<TokenId>::max()) return nullptr;
    ids->push_back(static_cast<TokenId>(id.get<std::uint64_t>()));
  }
  return ids;
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
