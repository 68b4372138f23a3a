// The module host_cuda: the launchers of csrc/cuda, their kernels run by host_cuda.h, as _core.cuda has them.
#include "../../csrc/python/bindings.h"

#include "../../csrc/cuda/launch.h"
#include "host_cuda.h"

namespace py = pybind11;
using namespace minillm;

PYBIND11_MODULE(host_cuda_kernels, m) {
    python::define_cuda(m);
    m.def("seed", [](uint64_t seed) { host_cuda::settings.seed = seed; });
    m.def("shared_memory", [](int bytes) { host_cuda::settings.shared_memory = bytes; });
    m.def("most_blocks_a_cluster", [](int number) { host_cuda::settings.most_blocks_a_cluster = number; });
    m.def("splits", &cuda::splits);
    m.def("processors", [](int number) { host_cuda::settings.processors = number; });
    m.def("allow", [](uintptr_t begin, int64_t bytes) { host_cuda::allow(python::at<void>(begin), bytes); });
    m.def("allow_everything", &host_cuda::allow_everything);
    m.def("execute_by", [](py::object function) {  // None: by host_cuda.h
        host_cuda::executor = nullptr;
        if (function.is_none()) return;
        host_cuda::executor = [function](const char* name, unsigned blocks, unsigned threads, size_t dynamic_shared,
                                         const std::vector<std::string>& parameters) {
            py::list bytes;
            for (const std::string& p : parameters) bytes.append(py::bytes(p));
            return function(name, blocks, threads, dynamic_shared, bytes).cast<std::string>();
        };
    });
    m.def("count", [](bool on) {
        host_cuda::settings.count = on;
        host_cuda::counters = {};
    });
    m.def("counters", [] {
        const host_cuda::Counters& c = host_cuda::counters;
        return py::dict(py::arg("loaded") = c.loaded, py::arg("stored") = c.stored,
                        py::arg("sectors_loaded") = c.sectors_loaded, py::arg("sectors_stored") = c.sectors_stored,
                        py::arg("blocks") = c.blocks, py::arg("launches") = c.launches);
    });
}
