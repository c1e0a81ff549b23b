// Arguments by name: a table has a row per field of a struct, and what Python passes must be
// exactly those. Tensors come as addresses, None or 0 where there is none.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace dcpo::bind {

namespace py = pybind11;

template <class T>
void assign(T& field, py::handle value) {
  field = value.cast<T>();
}
template <class T>
void assign(T*& field, py::handle value) {
  field = value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

template <class Args>
struct Field {
  const char* name;
  void (*set)(Args& args, py::handle value);
};

// A row: a member by its own name.
#define DCPO_FIELD(Args, name) \
  {#name, [](Args& a, py::handle value) { dcpo::bind::assign(a.name, value); }}

// TypeError for a name that is missing, unknown, or whose value is of no use.
template <class Args, size_t n>
void fill(Args& args, const Field<Args> (&table)[n], const py::dict& given) {
  for (const Field<Args>& field : table) {
    PyObject* value = PyDict_GetItemString(given.ptr(), field.name);
    if (!value) throw py::type_error(std::string("missing argument ") + field.name);
    try {
      field.set(args, value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string("argument ") + field.name + " can't be " +
                           py::repr(value).cast<std::string>());
    }
  }
  if (given.size() == n) return;
  for (const auto& item : given) {
    const std::string name = py::str(item.first);
    bool known = false;
    for (const Field<Args>& field : table) known = known || name == field.name;
    if (!known) throw py::type_error("unknown argument " + name);
  }
}

}  // namespace dcpo::bind
