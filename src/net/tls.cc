#include "net/tls.h"

#include <boost/system/error_code.hpp>
#include <stdexcept>

namespace kvrouter {
namespace {

using boost::system::error_code;

constexpr auto kOptions = TlsContext::default_workarounds | TlsContext::no_sslv2 | TlsContext::no_sslv3 |
                          TlsContext::no_tlsv1 | TlsContext::no_tlsv1_1 | TlsContext::no_compression |
                          TlsContext::single_dh_use;

void check(const error_code& error, const std::string& what) {
  if (error) throw std::invalid_argument(what + ": " + error.message());
}

}  // namespace

std::shared_ptr<TlsContext> server_tls(const std::string& certificate_file, const std::string& key_file) {
  auto context = std::make_shared<TlsContext>(TlsContext::tls_server);
  context->set_options(kOptions);
  error_code error;
  context->use_certificate_chain_file(certificate_file, error);
  check(error, "the TLS certificate " + certificate_file + " cannot be used");
  context->use_private_key_file(key_file, TlsContext::pem, error);  // fails, too, where it is another certificate's
  check(error, "the TLS key " + key_file + " cannot be used");
  return context;
}

std::shared_ptr<TlsContext> client_tls(const std::string& ca_file) {
  auto context = std::make_shared<TlsContext>(TlsContext::tls_client);
  context->set_options(kOptions);
  context->set_verify_mode(boost::asio::ssl::verify_peer);
  error_code error;
  if (ca_file.empty()) {
    context->set_default_verify_paths(error);
    check(error, "the system's certificate authorities cannot be read");
  } else {
    context->load_verify_file(ca_file, error);
    check(error, "the certificate authorities in " + ca_file + " cannot be used");
  }
  return context;
}

}  // namespace kvrouter
