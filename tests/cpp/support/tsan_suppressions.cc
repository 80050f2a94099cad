// libzmq comes uninstrumented from the system: ThreadSanitizer sees the memory it hands between threads, not the atomic
// operations it does so with.  What the library's own threads touch is left out; our threads are not.
extern "C" const char* __tsan_default_suppressions();

extern "C" const char* __tsan_default_suppressions() {
  return "called_from_lib:libzmq.so\nrace:libzmq.so\n";
}
