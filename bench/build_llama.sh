#!/usr/bin/env bash
# Build llama.cpp's bench programs and server from the source package of llama-cpp-python. usage: build_llama.sh FOLDER
# FOLDER/bin gets the programs, after some 20 minutes on 2 cores. Needs pip, g++, make; cmake comes from PyPI.
set -euo pipefail
folder=$1
python=${PYTHON:-.venv/bin/python}
programs=(llama-bench llama-batched-bench llama-server)
missing=0
for program in "${programs[@]}"; do [ -x "$folder/bin/$program" ] || missing=1; done
if [ $missing = 0 ]; then
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
  -DLLAMA_BUILD_SERVER=ON -DBUILD_SHARED_LIBS=OFF
"$cmake" --build "$folder/build" --target "${programs[@]}" --parallel "$(nproc)"
mkdir -p "$folder/bin"
cp "${programs[@]/#/$folder/build/bin/}" "$folder/bin/"
