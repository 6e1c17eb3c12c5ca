# Every target that needs something installs it first (scripts/setup); a second time that takes a moment.

MODULE := github.com/kvmlet/kvmlet
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvmlet
PATH   := $(PATH):/usr/local/go/bin
PREFIX ?= /usr/local

# Arguments of "make run", for example: make run ARGS='--cpus 2 -- nproc'
ARGS ?=

# Packages whose tests boot machines in the lab. Two run at a time, since a lab takes one core, and without the race
# detector, which QEMU's emulation would slow down too much. They run programs that go test does not know of, so what its
# cache has of them may be about other programs (-count=1).
LAB_PACKAGES ?= guest/guesttest guest/lab guest/lab/labtest vmm vmm/cli/clitest
PACKAGES     = $(eval PACKAGES := $$(shell PATH='$(PATH)' go list ./...))$(PACKAGES)
LAB          = $(filter $(addprefix $(MODULE)/,$(LAB_PACKAGES)),$(PACKAGES))
RACE         = $(filter-out $(LAB),$(PACKAGES))
TIMEOUT      ?= 15m
# Half of it for a package's tests in the lab, which take up to ten minutes on a busy machine. Where they fail because
# QEMU made a guest hang, they are run once more (guest/lab/labtest), within the other half.
LAB_TIMEOUT  ?= 30m

# How long each fuzz target runs in "make fuzz", and how long all of them together in "make test".
FUZZTIME      ?= 1m
TEST_FUZZTIME ?= 60s

.PHONY: help build run test lint fuzz bench setup install clean

help:
	@echo 'make run      boot a guest: a shell on a terminal, a short tour elsewhere (ARGS=... for kvmlet run)'
	@echo 'make build    build ./kvmlet, one static file'
	@echo 'make test     run all tests, and every fuzz target for a few seconds'
	@echo 'make lint     run the linters and the checks of rules about imports and unsafe'
	@echo 'make fuzz     run every fuzz target for FUZZTIME=$(FUZZTIME)'
	@echo 'make bench    measure starts and disks beside QEMU (ARGS=... for scripts/bench, DISKARGS=... for'
	@echo '              scripts/diskbench), then run the Go benchmarks'
	@echo 'make install  install kvmlet in PREFIX=$(PREFIX)'
	@echo 'make setup    install what the other targets need: Debian packages, Go modules'
	@echo 'make clean    remove what was built here; cached images stay in $(CACHE)'

setup:
	@scripts/setup

build: setup
	@CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o kvmlet .

run: build
	@$(if $(ARGS),./kvmlet run $(ARGS),scripts/tour)

# With KVMLET_REQUIRE a test that lacks something of its host fails instead of being skipped: setup has installed it.
test: setup $(CACHE)/bin/testsum
	@KVMLET_REQUIRE=all $(CACHE)/bin/testsum \
		'go vet ./...' \
		'go test -json -vet=off -race -timeout $(TIMEOUT) $(RACE)' \
		$(if $(LAB),'go test -json -vet=off -count=1 -p 2 -timeout $(LAB_TIMEOUT) $(LAB)') \
		'go run ./scripts/fuzz -time 3s -total $(TEST_FUZZTIME)'

fuzz: setup $(CACHE)/bin/testsum
	@$(CACHE)/bin/testsum 'go run ./scripts/fuzz -time $(FUZZTIME)'

bench: setup
	@go run ./scripts/bench $(ARGS)
	@go run ./scripts/diskbench $(DISKARGS)
	@go test -run='^$$' -bench=. -benchmem $(PACKAGES)

# go build knows best whether there is something to do.
.PHONY: $(CACHE)/bin/testsum
$(CACHE)/bin/testsum: setup
	@go build -o $@ ./scripts/testsum

lint:
	@linter=$$(scripts/setup lint) && \
		$$linter run ./... && \
		go run ./scripts/checkunsafe && \
		go mod tidy -diff

install: build
	install -D -m 755 kvmlet $(DESTDIR)$(PREFIX)/bin/kvmlet

clean:
	rm -f kvmlet cover.out
