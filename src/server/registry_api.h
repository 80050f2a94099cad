// GET, POST and DELETE /workers: which workers there are.
#pragma once

#include "server/fleet.h"
#include "server/http_server.h"
#include "server/router_api.h"

namespace kvrouter {

ApiAnswer answer_registry_request(Router& router, Fleet& fleet, const HttpRequest& request);

}  // namespace kvrouter
