# katashim. `make demo` and `make test` do all of their own set-up on a fresh Debian 12 as root.

PREFIX  ?= /usr/local
DESTDIR ?=
# Where `make install` puts the package; the programs in PREFIX/bin know the place and their interpreter.
LIBDIR  ?= $(PREFIX)/lib/katashim
PYTHON  ?= /usr/bin/python3
export PYTHON

stage  := $(DESTDIR)$(LIBDIR)
py     := .venv/bin/python
pytest := $(py) -m pytest

.PHONY: help setup demo test test-fast test-matrix soak bench proto lint install clean

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup:  ## Debian packages, .venv and the guest image, as far as they are missing
	@test/harness/setup.sh develop

demo:  ## containers in virtual machines by a private containerd, step by step
	@test/harness/setup.sh run
	@$(py) test/harness/demo.py

test: setup  ## everything but the long runs and the other versions
	$(pytest) -m "not soak and not matrix"

test-fast: setup  ## what needs no virtual machine
	$(pytest) -m "not vm and not soak and not matrix"

test-matrix: setup  ## the main job with other versions of the real components
	$(pytest) -m matrix

soak: setup  ## hundreds of cycles
	$(pytest) -m soak

bench: setup  ## measurements; SPECIFICATION.md has the budgets
	@set -e; for bench in test/bench/bench_*.py; do echo "== $$bench"; $(py) $$bench; done

proto:  ## compile katashim/ttrpc/proto/*.proto into descriptors.binpb
	@test/harness/setup.sh develop
	$(py) katashim/ttrpc/proto/compile.py

lint: setup  ## ruff
	.venv/bin/ruff check .

install:  ## into PREFIX, with a virtual environment of its own below PREFIX/lib/katashim
	test/harness/setup.sh packages
	mkdir -p $(stage)
	rm -rf $(stage)/katashim $(stage)/defaults
	cp -a katashim defaults $(stage)
	find $(stage)/katashim -name __pycache__ -type d -prune -exec rm -rf {} +
	test -x $(stage)/venv/bin/python || $(PYTHON) -m venv $(stage)/venv
	$(stage)/venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(stage)/venv/bin/python -m compileall -q -s "$(DESTDIR)" $(stage)/katashim
	$(stage)/venv/bin/python katashim/shim/install.py --destdir "$(DESTDIR)" --prefix "$(PREFIX)" \
	    --python "$(LIBDIR)/venv/bin/python" --root "$(LIBDIR)"

clean:  ## what was made in this directory; the guest image and its cache stay
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
