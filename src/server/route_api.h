// POST /route: where would (or should) this request go, and why?
//
//   {"tokens": [ids...], "lora_name": name}        token ids, or
//   {"prompt": text, "model": name}                a text, or
//   {"messages": [...], "model": name}             a chat, tokenized by a worker
//      -> {"worker_id", "url", "overlap_blocks", "num_blocks", "num_tokens", "workers": [{"worker_id", "score",
//          "overlap_blocks", "kv_usage", "waiting"}...]}
//   {"requests": [{"tokens": [...]}...], "lora_name": name}    a batch, decided together
//      -> {"worker_ids": [n...], "overlap_blocks": [k...]}
//
// 422: no worker could tell the tokens of the text.
#pragma once

#include <memory>

#include "server/fleet.h"
#include "server/http_server.h"
#include "server/tokenizer.h"

namespace kvrouter {

void answer_route(Router& router, Fleet& fleet, Tokenizer& tokenizer, const HttpRequest& request,
                  std::shared_ptr<HttpReply> reply);

}  // namespace kvrouter
