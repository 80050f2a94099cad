// JSON that others sent, read from simdjson's tape: no tree of values is built, which for a prompt of token ids costs
// more than all the rest of a decision.  The whole text is checked, also what nobody asks for.
#pragma once

#include <simdjson.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvrouter/block_hash.h"

namespace kvrouter {

// Takes `text` for an object.  Empty on success, else what is wrong with it; `what` names it there ("the body").
// `object` lasts until the thread's next call.
std::string parse_json_object(const std::string& text, std::string_view what, simdjson::dom::object& object);

// The value of that name; nothing where there is none, or null.  Of several, the last, as Python's json has it: router
// and worker have to read the same request.
std::optional<simdjson::dom::element> json_field(simdjson::dom::object object, std::string_view name);

// False where an entry is no token id; `out` is empty then.
bool read_token_ids(simdjson::dom::array list, std::vector<TokenId>& out);

}  // namespace kvrouter
