// The Python side of the extension: an empty module, so that packaging treats the library as an extension. Its
// functions are plain C, called through ctypes (fastrl_kernels/_native.py).

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>

// Incremented whenever a signature changes; _native.py refuses a library of another version.
extern "C" __attribute__((visibility("default"))) int32_t fastrl_abi_version(void) { return 1; }

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Native CPU kernels; functions are called through ctypes.", 0,
    nullptr, nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module); }
