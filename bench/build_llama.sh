#!/usr/bin/env bash
# Build llama.cpp's bench programs from the source package of llama-cpp-python. usage: build_llama.sh FOLDER (16 minutes on 2 cores)
# FOLDER/bin gets llama-bench and llama-batched-bench. Needs pip, g++, make; cmake comes from PyPI.
set -euo pipefail
folder=$1
python=${PYTHON:-.venv/bin/python}
if [ -x "$folder/bin/llama-bench" ] && [ -x "$folder/bin/llama-batched-bench" ]; then
  echo "llama.cpp is built already in $folder/bin"
  exit 0
fi
mkdir -p "$folder/source"
"$python" -m pip install --quiet cmake gguf
"$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$folder" llama-cpp-python==0.3.36
tar -xzf "$folder"/llama_cpp_python-*.tar.gz -C "$folder/source" --strip-components 1
cmake=$(dirname "$python")/cmake
"$cmake" -S "$folder/source/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DBUILD_SHARED_LIBS=OFF
"$cmake" --build "$folder/build" --target llama-bench llama-batched-bench --parallel "$(nproc)"
mkdir -p "$folder/bin"
cp "$folder/build/bin/llama-bench" "$folder/build/bin/llama-batched-bench" "$folder/bin/"
