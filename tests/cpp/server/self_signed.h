// A certificate that signs itself, for 127.0.0.1, and its key, in files that go with the object.
#pragma once

#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace kvrouter::testing {

class SelfSigned {
 public:
  SelfSigned() {
    char folder[] = "/tmp/kvrouter-tls-XXXXXX";
    if (!::mkdtemp(folder)) throw std::runtime_error("mkdtemp");
    folder_ = folder;
    const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(EVP_EC_gen("P-256"), &EVP_PKEY_free);
    const std::unique_ptr<X509, decltype(&X509_free)> certificate(X509_new(), &X509_free);
    X509* x = certificate.get();
    X509_set_version(x, 2);  // which is version 3
    ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
    X509_gmtime_adj(X509_getm_notBefore(x), -3600);
    X509_gmtime_adj(X509_getm_notAfter(x), 24 * 3600);
    X509_NAME* name = X509_get_subject_name(x);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>("test"), -1, -1, 0);
    X509_set_issuer_name(x, name);
    X509_set_pubkey(x, key.get());
    X509_EXTENSION* names = X509V3_EXT_conf_nid(nullptr, nullptr, NID_subject_alt_name, "IP:127.0.0.1");
    X509_add_ext(x, names, -1);
    X509_EXTENSION_free(names);
    if (X509_sign(x, key.get(), EVP_sha256()) == 0) throw std::runtime_error("X509_sign");
    write(certificate_file(), [&](std::FILE* file) { return PEM_write_X509(file, x); });
    write(key_file(), [&](std::FILE* file) {
      return PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
    });
  }
  ~SelfSigned() {
    ::unlink(certificate_file().c_str());
    ::unlink(key_file().c_str());
    ::rmdir(folder_.c_str());
  }
  SelfSigned(const SelfSigned&) = delete;
  SelfSigned& operator=(const SelfSigned&) = delete;

  std::string certificate_file() const { return folder_ + "/certificate.pem"; }
  std::string key_file() const { return folder_ + "/key.pem"; }

 private:
  template <typename Write>
  static void write(const std::string& path, Write content) {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (!file) throw std::runtime_error("cannot write " + path);
    const bool written = content(file) == 1;
    if (std::fclose(file) != 0 || !written) throw std::runtime_error("cannot write " + path);
  }

  std::string folder_;
};

}  // namespace kvrouter::testing
