// TLS as both ends of the service use it: version 1.2 at least, and a peer's certificate is always checked by clients.
#pragma once

#include <boost/asio/ssl/context.hpp>
#include <memory>
#include <string>

namespace kvrouter {

using TlsContext = boost::asio::ssl::context;

// For a server with this certificate (chain, leaf first) and private key, PEM files both.  Throws
// std::invalid_argument, naming the file, when one cannot be used or the two do not belong together.
std::shared_ptr<TlsContext> server_tls(const std::string& certificate_file, const std::string& key_file);

// For a client that trusts the authorities of this PEM file; empty: the system's.  Throws as server_tls() does.
std::shared_ptr<TlsContext> client_tls(const std::string& ca_file);

// Before a client's handshake: the peer's certificate has to be for this name or IP address.  False, and nothing may be
// sent, where no certificate can be.
bool expect_peer(SSL* tls, const std::string& host);

// After a handshake that failed: what was wrong with the peer's certificate, in brackets; empty if nothing was.
std::string why_untrusted(const SSL* tls);

}  // namespace kvrouter
