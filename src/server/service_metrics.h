// The /metrics page of the service, for Prometheus; docs/operations.md explains each name.
#pragma once

#include <string>

#include "server/fleet.h"
#include "server/gateway.h"
#include "server/tokenizer.h"

namespace kvrouter {

std::string service_metrics(const Router& router, const Fleet& fleet, const Gateway& gateway,
                            const Tokenizer& tokenizer);

}  // namespace kvrouter
