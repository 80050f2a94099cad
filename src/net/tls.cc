#include "net/tls.h"

#include <openssl/x509v3.h>

#include <boost/asio/ip/address.hpp>
#include <boost/asio/ssl/verify_mode.hpp>
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

bool expect_peer(SSL* tls, const std::string& host) {
  X509_VERIFY_PARAM* wanted = SSL_get0_param(tls);
  error_code not_literal;
  boost::asio::ip::make_address(host, not_literal);
  if (!not_literal) return X509_VERIFY_PARAM_set1_ip_asc(wanted, host.c_str()) == 1;
  X509_VERIFY_PARAM_set_hostflags(wanted, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
  return X509_VERIFY_PARAM_set1_host(wanted, host.c_str(), 0) == 1 &&
         SSL_set_tlsext_host_name(tls, host.c_str()) == 1;  // of names only (RFC 6066, 3)
}

std::string why_untrusted(const SSL* tls) {
  const long reason = SSL_get_verify_result(tls);
  if (reason == X509_V_OK) return {};
  return std::string(" (") + X509_verify_cert_error_string(reason) + "; --upstream-ca names whom to trust)";
}

}  // namespace kvrouter
