/* python_module.c: the C interface as Python functions, the only file that knows Python.
 *
 *     _C.forward(allocate, *values)     _C.backward(allocate, *values)     _C.choose(which_pass, *values)
 *
 * The values are members of struct fa_params, in the order of one table, whose names are _C.FIELDS; values left out at the
 * end are 0 or NULL. They go by position because a call must cost little: names alone would take as long as the checks.
 * Tensors come as (address, strides), so no PyTorch header is needed and one binary, in CPython's limited API, serves
 * every Python and every PyTorch. `allocate(bytes)` gives scratch: anything with a data_ptr() method. The GIL is
 * released while a kernel runs. Exception types live in the module's state: there are no globals. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "flash_attn.h"

#define ALIGNMENT 64                        /* of the workspace */

struct state { PyObject *value_error, *type_error, *unsupported_error; };

static struct state *state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

/* ---- fields: one row for each member that Python may set, in the order in which Python passes them ---- */

enum kind { TENSOR, ROWS, SCORES, POINTER, INT64, ENUM, DOUBLE, BOOL };

struct field { const char *name; size_t offset; enum kind kind; };

#define FIELD(member, kind) { #member, offsetof(struct fa_params, member), kind }

static const struct field fields[] = {
    FIELD(device, ENUM),       FIELD(dtype, ENUM),        FIELD(n_threads, INT64), FIELD(device_index, INT64), FIELD(stream, POINTER),
    /* tensors */
    FIELD(q, TENSOR),          FIELD(k, TENSOR),          FIELD(v, TENSOR),        FIELD(out, TENSOR),
    FIELD(lse, ROWS),
    FIELD(cu_q, POINTER),      FIELD(cu_k, POINTER),      FIELD(seqused_k, POINTER),
    FIELD(alibi, POINTER),     FIELD(alibi_stride_b, INT64),
    FIELD(rng, POINTER),       FIELD(bias, SCORES),       FIELD(mask, SCORES),
    /* sizes and scalars */
    FIELD(b, INT64),           FIELD(h, INT64),           FIELD(hk, INT64),
    FIELD(sq, INT64),          FIELD(sk, INT64),          FIELD(d, INT64),         FIELD(d_v, INT64),
    FIELD(total_q, INT64),     FIELD(total_k, INT64),
    FIELD(scale, DOUBLE),      FIELD(softcap, DOUBLE),
    FIELD(window_left, INT64), FIELD(window_right, INT64),
    FIELD(dropout_p, DOUBLE),  FIELD(deterministic, BOOL),
    /* backward */
    FIELD(dout, TENSOR),       FIELD(dlse, ROWS),
    FIELD(dq, TENSOR),         FIELD(dk, TENSOR),         FIELD(dv, TENSOR),       FIELD(dbias, SCORES),
    /* forward, if s_dmask is wanted */
    FIELD(s_dmask, POINTER),   FIELD(dmask_sq, INT64),    FIELD(dmask_sk, INT64),
};
enum { FIELDS = sizeof fields / sizeof *fields };

static const char *const expected[] = {
    [TENSOR] = "None or a tuple (address, strides) of a tensor with three or four dimensions",
    [ROWS] = "None or a tuple (address, strides) of a tensor with two or three dimensions",
    [SCORES] = "None or a tuple of six ints (ptr, dtype, stride_b, stride_h, stride_q, stride_k)",
    [POINTER] = "None or an int (an address)",
    [INT64] = "an int of at most 64 bits",
    [ENUM] = "an int, one of this module's constants",
    [DOUBLE] = "a float",
    [BOOL] = "a bool",
};

/* The readers below return whether they could; a Python error may be set when they could not. */

static bool read_int64(PyObject *value, int64_t *out)
{
    long long number = PyLong_AsLongLong(value);
    *out = number;
    return number != -1 || !PyErr_Occurred();
}

static bool read_pointer(PyObject *value, void **out)
{
    *out = value == Py_None ? NULL : PyLong_AsVoidPtr(value);
    return *out || !PyErr_Occurred();
}

static bool read_enum(PyObject *value, void *out)
{
    long number = PyLong_AsLong(value);
    int narrow = (int)number;
    if (narrow != number || (number == -1 && PyErr_Occurred())) return false;
    memcpy(out, &narrow, sizeof narrow);
    return true;
}

/* (address, strides), as torch has them: of (b, s, h, channel), or of rows (b, h, s); without b where packed. */
static bool read_tensor(PyObject *value, bool rows, struct fa_tensor *out)
{
    if (value == Py_None) return true;
    PyObject *strides = PyTuple_Check(value) && PyTuple_Size(value) == 2 ? PyTuple_GetItem(value, 1) : NULL;
    const Py_ssize_t rank = strides && PyTuple_Check(strides) ? PyTuple_Size(strides) - !rows : 0;
    return (rank == 2 || rank == 3)
        && read_pointer(PyTuple_GetItem(value, 0), &out->ptr)
        && (rank == 2 || read_int64(PyTuple_GetItem(strides, 0), &out->stride_b))
        && read_int64(PyTuple_GetItem(strides, rank - 2), rows ? &out->stride_h : &out->stride_s)
        && read_int64(PyTuple_GetItem(strides, rank - 1), rows ? &out->stride_s : &out->stride_h);
}

static bool read_scores(PyObject *value, struct fa_scores *out)
{
    if (value == Py_None) return true;
    return PyTuple_Check(value) && PyTuple_Size(value) == 6
        && read_pointer(PyTuple_GetItem(value, 0), &out->ptr)
        && read_enum(PyTuple_GetItem(value, 1), &out->dtype)
        && read_int64(PyTuple_GetItem(value, 2), &out->stride_b)
        && read_int64(PyTuple_GetItem(value, 3), &out->stride_h)
        && read_int64(PyTuple_GetItem(value, 4), &out->stride_q)
        && read_int64(PyTuple_GetItem(value, 5), &out->stride_k);
}

static bool read_double(PyObject *value, double *out)
{
    *out = PyFloat_AsDouble(value);
    return *out != -1 || !PyErr_Occurred();
}

static bool read_bool(PyObject *value, bool *out)
{
    *out = value == Py_True;
    return PyBool_Check(value);
}

static bool read_field(const struct field *field, PyObject *value, struct fa_params *p)
{
    void *member = (char *)p + field->offset;
    switch (field->kind) {
    case TENSOR:  return read_tensor(value, false, member);
    case ROWS:    return read_tensor(value, true, member);
    case SCORES:  return read_scores(value, member);
    case POINTER: return read_pointer(value, member);
    case INT64:   return read_int64(value, member);
    case ENUM:    return read_enum(value, member);
    case DOUBLE:  return read_double(value, member);
    case BOOL:    return read_bool(value, member);
    }
    return false;
}

/* Fills *p from values in the order of the table. Returns false with a TypeError set. */
static bool parse(PyObject *module, PyObject *const *values, Py_ssize_t count, struct fa_params *p)
{
    memset(p, 0, sizeof *p);
    if (count > FIELDS) {
        PyErr_Format(state_of(module)->type_error, "a call has %d fields, got %zd values", FIELDS, count);
        return false;
    }
    for (Py_ssize_t n = 0; n < count; n++) {
        if (read_field(&fields[n], values[n], p)) continue;
        PyErr_Clear();
        PyErr_Format(state_of(module)->type_error, "%s must be %s, got %R", fields[n].name, expected[fields[n].kind], values[n]);
        return false;
    }
    const char *debug = p->device == FA_CUDA ? getenv("FLASH_ATTN_DEBUG") : NULL;
    p->debug = debug && strcmp(debug, "1") == 0;
    return true;
}

/* ---- calls ---- */

/* Sets the exception that a status stands for; returns NULL. */
static PyObject *raise_status(PyObject *module, enum fa_status status, const struct fa_error *error)
{
    const struct state *state = state_of(module);
    PyErr_SetString(status == FA_INVALID ? state->value_error
                    : status == FA_UNSUPPORTED ? state->unsupported_error : PyExc_RuntimeError, error->text);
    return NULL;
}

/* Scratch from Python, aligned here. Returns its owner, or NULL with an error set. */
static PyObject *allocate_workspace(PyObject *allocate, int64_t bytes, struct fa_params *p)
{
    PyObject *owner = PyObject_CallFunction(allocate, "L", (long long)bytes + ALIGNMENT - 1);
    PyObject *address = owner ? PyObject_CallMethod(owner, "data_ptr", NULL) : NULL;
    uintptr_t start = address ? (uintptr_t)PyLong_AsVoidPtr(address) : 0;
    Py_XDECREF(address);
    if (start == 0) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        Py_XDECREF(owner);
        return NULL;
    }
    p->workspace = (void *)((start + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    p->workspace_bytes = bytes;
    return owner;
}

static PyObject *call(enum fa_pass pass, PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct fa_params p;
    struct fa_error error;
    PyObject *owner = NULL;
    int64_t bytes;
    if (count < 1) {
        PyErr_SetString(state_of(module)->type_error, "takes allocate and the fields of a call, got nothing");
        return NULL;
    }
    if (!parse(module, args + 1, count - 1, &p)) return NULL;
    enum fa_status status = fa_workspace(pass, &p, &bytes, &error);
    if (status) return raise_status(module, status, &error);
    if (bytes > 0 && !(owner = allocate_workspace(args[0], bytes, &p))) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = pass == FA_FORWARD ? fa_forward(&p, &error) : fa_backward(&p, &error);
    Py_END_ALLOW_THREADS
    Py_XDECREF(owner);
    if (status) return raise_status(module, status, &error);
    Py_RETURN_NONE;
}

static PyObject *forward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    return call(FA_FORWARD, module, args, count);
}

static PyObject *backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    return call(FA_BACKWARD, module, args, count);
}

static PyObject *choose(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct fa_params p;
    struct fa_error why;
    const char *name;
    int pass;
    if (count < 1 || !read_enum(args[0], &pass)) {
        PyErr_Clear();
        PyErr_SetString(state_of(module)->type_error, "choose takes FORWARD or BACKWARD and the fields of a call");
        return NULL;
    }
    if (!parse(module, args + 1, count - 1, &p)) return NULL;
    enum fa_status status = fa_choose((enum fa_pass)pass, &p, &name, &why);
    if (status && status != FA_UNSUPPORTED) return raise_status(module, status, &why);
    return Py_BuildValue("zs", name, why.text);
}

static PyObject *info(PyObject *module, PyObject *unused)
{
    char text[2048];
    (void)module;
    (void)unused;
    fa_info(text, sizeof text);
    return PyUnicode_FromString(text);
}

/* ---- the module ---- */

#define POSITIONAL(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef methods[] = {
    { "forward", POSITIONAL(forward),
      "forward(allocate, *values): attention into out and lse; allocate(bytes) gives scratch." },
    { "backward", POSITIONAL(backward),
      "backward(allocate, *values): gradients into dq, dk and dv, from dout, q, k, v, out and lse." },
    { "choose", POSITIONAL(choose),
      "choose(which_pass, *values): (name of the kernel that would run or None, refusals one a line)." },
    { "info", info, METH_NOARGS, "info(): the machine and the kernel table, as text." },
    { NULL, NULL, 0, NULL },
};

/* A new exception type with two bases, added to the module under the last part of its name. */
static PyObject *add_exception(PyObject *module, const char *name, const char *doc, PyObject *base,
                               PyObject *other)
{
    PyObject *bases = PyTuple_Pack(2, base, other);
    PyObject *type = bases ? PyErr_NewExceptionWithDoc(name, doc, bases, NULL) : NULL;
    Py_XDECREF(bases);
    if (type && PyModule_AddObjectRef(module, strchr(name, '.') + 1, type) < 0) Py_CLEAR(type);
    return type;
}

static bool add_exceptions(PyObject *module)
{
    struct state *state = state_of(module);
    return (state->value_error = add_exception(
                module, "flash_attn.ArgumentValueError",
                "An argument has a value that no kernel could serve.",
                PyExc_ValueError, PyExc_RuntimeError))
        && (state->type_error = add_exception(
                module, "flash_attn.ArgumentTypeError",
                "An argument has the wrong type.",
                PyExc_TypeError, PyExc_RuntimeError))
        && (state->unsupported_error = add_exception(
                module, "flash_attn.UnsupportedError",
                "A legal call for which this build or machine has no kernel.",
                PyExc_ValueError, PyExc_NotImplementedError));
}

/* FIELDS: the names of the values of a call, in their order. */
static bool add_field_names(PyObject *module)
{
    PyObject *names = PyTuple_New(FIELDS);
    for (int n = 0; names && n < FIELDS; n++) {
        PyObject *name = PyUnicode_FromString(fields[n].name);
        if (!name || PyTuple_SetItem(names, n, name) < 0) Py_CLEAR(names);
    }
    const bool added = names && PyModule_AddObjectRef(module, "FIELDS", names) == 0;
    Py_XDECREF(names);
    return added;
}

static int exec_module(PyObject *module)
{
    static const struct { const char *name; long value; } constants[] = {
        { "FORWARD", FA_FORWARD },   { "BACKWARD", FA_BACKWARD },
        { "CPU", FA_CPU },           { "CUDA", FA_CUDA },
        { "FLOAT32", FA_FLOAT32 },   { "FLOAT16", FA_FLOAT16 },
        { "BFLOAT16", FA_BFLOAT16 }, { "FLOAT64", FA_FLOAT64 },
    };
    for (size_t n = 0; n < sizeof constants / sizeof *constants; n++)
        if (PyModule_AddIntConstant(module, constants[n].name, constants[n].value) < 0) return -1;
    return add_field_names(module) && add_exceptions(module) ? 0 : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    struct state *state = state_of(module);
    Py_VISIT(state->value_error);
    Py_VISIT(state->type_error);
    Py_VISIT(state->unsupported_error);
    return 0;
}

static int clear(PyObject *module)
{
    struct state *state = state_of(module);
    Py_CLEAR(state->value_error);
    Py_CLEAR(state->type_error);
    Py_CLEAR(state->unsupported_error);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    { Py_mod_exec, (void *)exec_module },
    { 0, NULL },
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "flash_attn._C",
    .m_doc = "Exact attention in C: forward and backward on raw pointers. flash_attn._backend is its caller.",
    .m_size = sizeof(struct state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&definition);
}
