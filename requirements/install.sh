#!/bin/sh
# Make .venv: the pinned packages, Detectron2 v0.6 without its compiled extension, and sssd itself.
# An installation that finished is recognised by .venv/stamp and left alone; one that was
# interrupted is started afresh.
#
#   PYTHON=...  the Python to use (3.10 to 3.13); otherwise the first that fits is taken
set -eu
cd "$(dirname "$0")/.."

venv_python=.venv/bin/python
uv=.venv/bootstrap/bin/uv
stamp=.venv/stamp
unfinished=.venv/unfinished

say() { printf 'sssd: %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Sets python and version to the first that fits.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.10 python
    fi
    python=
    tried=
    for candidate in "$@"; do
        version=$(version_of "$candidate") || version=none
        case "$version" in
            3.10 | 3.11 | 3.12 | 3.13)
                python=$candidate
                break
                ;;
            none) tried="$tried, $candidate does not run" ;;
            *) tried="$tried, $candidate is $version" ;;
        esac
    done
    [ -n "$python" ] || fail "Python 3.10, 3.11, 3.12 or 3.13 is needed and was not found" \
        "(${tried#, }): name one with make PYTHON=/path/to/python3.11."
}

same_python() {
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv_python")" ]
}

install() { "$uv" pip install --python "$venv_python" "$@"; }

# What the installation depends on. The place counts too: .venv names it.
wanted=$({ pwd; cat requirements/*.txt requirements/install.sh setup.py pyproject.toml; } | cksum)

# Ours has one of the two files: the stamp when it is whole, `unfinished` while it is not.
if [ -f "$stamp" ] && [ -x "$venv_python" ] && [ -x "$uv" ] && same_python; then
    [ "$(cat "$stamp")" != "$wanted" ] || exit 0
    say "updating .venv: what it was made from changed"
    mv "$stamp" "$unfinished"
elif [ -e .venv ] && [ ! -f "$stamp" ] && [ ! -f "$unfinished" ]; then
    fail "the folder $PWD/.venv was not made by sssd: move it away, or activate it and run" \
        "pip install . to use sssd with the Detectron2 that it holds."
else
    find_python
    say "making .venv with Python $version ($python)"
    mkdir -p .venv
    : >"$unfinished"
    rm -f "$stamp"
    find .venv -mindepth 1 -maxdepth 1 ! -name unfinished -exec rm -rf {} +
    # Without pip, because Debian's python3 cannot put it there unless python3-venv is installed.
    "$python" -m venv --without-pip .venv ||
        fail "$python cannot make virtual environments: install its venv module."
fi

# uv reads its own settings, not pip's: hand over a mirror, trust the system's certificates where
# there are any, and keep the cache here where the usual place cannot be written.
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
"$venv_python" - <<'END' && export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"
import os, ssl, sys
paths = ssl.get_default_verify_paths()
sys.exit(not (paths.cafile or (paths.capath and os.listdir(paths.capath))))
END
cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/uv}
mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] || export UV_CACHE_DIR="$PWD/.venv/cache"

if [ -x "$uv" ]; then
    install --quiet --target .venv/bootstrap -r requirements/bootstrap.txt
else
    say "fetching $(cat requirements/bootstrap.txt)"
    # A target folder is allowed where pip may not touch the system's own packages.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore \
        "$python" -m pip install --quiet --disable-pip-version-check \
        --target .venv/bootstrap -r requirements/bootstrap.txt ||
        fail "pip could not install $(cat requirements/bootstrap.txt) (the reason is above);" \
            "if $python has no pip, install its package (Debian: python3-pip)."
fi

say "installing the pinned packages (about 5 GB, most of it torch with CUDA; minutes at first)"
install --build-constraints requirements/requirements.txt -r requirements/requirements.txt

say "installing Detectron2 v0.6 without its compiled extension"
install --no-deps --no-build-isolation --require-hashes -r requirements/detectron2.txt \
    -C--global-option=build_py -C--build-option=--skip-build

say "installing torchdistill, with which the tests compare the classification losses"
install --no-deps --require-hashes -r requirements/torchdistill.txt

say "installing sssd from this folder"
install --no-deps --no-build-isolation --editable .

echo "$wanted" >"$unfinished"
mv "$unfinished" "$stamp"
say "installed"
