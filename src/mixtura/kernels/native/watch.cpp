// Whether Python objects are still made of what they were made of: asked often, from cold caches.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <vector>

#include "records.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace mixtura {
namespace {

// Dicts that had certain entries, entries that dicts had or lacked, and objects that had certain classes. All
// are held, so that no address that is compared here can have become another object's.
class Watch {
public:
    Watch(const nb::list& dicts, const nb::list& owners, const nb::tuple& names, const nb::list& objects) {
        for (const nb::handle one : dicts) add_dict(nb::cast<nb::dict>(one));
        for (const nb::handle name : names) names_.push_back(nb::borrow(name));
        for (const nb::handle one : owners) add_owner(nb::cast<nb::dict>(one));
        for (const nb::handle one : objects) objects_.push_back({nb::borrow(one), nb::borrow(type_of(one))});
    }

    // Whether each dict has the same entries in the same order, each owner the same of its named entries, and
    // each object the same class.
    bool is_same() const { return are_dicts_same() && are_owners_same() && are_classes_same(); }

private:
    struct Dict {
        nb::object dict;
        Py_ssize_t size;
    };
    struct Object {
        nb::object object, type;
    };
    struct Entry {
        nb::object key, value;
    };
    // What the dicts hold, one behind the other; and what each owner has of each name, no object for nothing.
    std::vector<Entry> entries_;
    std::vector<nb::object> named_;
    std::vector<nb::object> owners_, names_;
    std::vector<Dict> dicts_;
    std::vector<Object> objects_;

    static nb::handle type_of(nb::handle object) { return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())); }

    void add_dict(const nb::dict& dict) {
        dicts_.push_back({dict, PyDict_Size(dict.ptr())});
        PyObject *key = nullptr, *value = nullptr;
        Py_ssize_t at = 0;
        while (PyDict_Next(dict.ptr(), &at, &key, &value)) entries_.push_back({nb::borrow(key), nb::borrow(value)});
    }

    void add_owner(const nb::dict& owner) {
        owners_.push_back(owner);
        for (const nb::object& name : names_) named_.push_back(nb::borrow(PyDict_GetItem(owner.ptr(), name.ptr())));
    }

    // The objects lie anywhere, and each would be waited for: so some are asked of memory ahead.
    static void fetch(const nb::object& object) { __builtin_prefetch(object.ptr()); }
    static constexpr std::size_t ahead = 12;

    bool are_dicts_same() const {
        const Entry* expected = entries_.data();
        for (std::size_t i = 0; i < dicts_.size(); ++i) {
            fetch(dicts_[std::min(i + ahead, dicts_.size() - 1)].dict);
            PyObject* const dict = dicts_[i].dict.ptr();
            if (PyDict_Size(dict) != dicts_[i].size) return false;
            PyObject *key = nullptr, *value = nullptr;
            Py_ssize_t at = 0;
            for (Py_ssize_t left = dicts_[i].size; left > 0; --left, ++expected) {
                if (!PyDict_Next(dict, &at, &key, &value)) return false;
                if (key != expected->key.ptr() || value != expected->value.ptr()) return false;
            }
        }
        return true;
    }

    bool are_owners_same() const {
        const nb::object* expected = named_.data();
        for (std::size_t i = 0; i < owners_.size(); ++i) {
            fetch(owners_[std::min(i + ahead, owners_.size() - 1)]);
            for (const nb::object& name : names_) {
                if (PyDict_GetItem(owners_[i].ptr(), name.ptr()) != (expected++)->ptr()) return false;
            }
        }
        return true;
    }

    bool are_classes_same() const {
        for (std::size_t i = 0; i < objects_.size(); ++i) {
            fetch(objects_[std::min(i + ahead, objects_.size() - 1)].object);
            if (type_of(objects_[i].object).ptr() != objects_[i].type.ptr()) return false;
        }
        return true;
    }
};

}  // namespace

void bind_watch(nb::module_& m) {
    nb::class_<Watch>(m, "Watch")
        .def(nb::init<const nb::list&, const nb::list&, const nb::tuple&, const nb::list&>(), "dicts"_a, "owners"_a,
             "names"_a, "objects"_a)
        .def("is_same", &Watch::is_same);
}

}  // namespace mixtura
