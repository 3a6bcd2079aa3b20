// Errors of the compiled module. One exception type; its kind decides which Python class the
// binding raises. Messages follow `op: what came; what is wanted; what to do`.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace flexidepth {

enum class ErrorKind { kShape, kValue, kDtype, kUnsupported, kBusy, kClosed, kMemory, kInternal };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(kind, message.str());
}

template <class... Parts>
void check(bool ok, ErrorKind kind, const Parts&... parts) {
  if (!ok) fail(kind, parts...);
}

}  // namespace flexidepth
