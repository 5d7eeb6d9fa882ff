// What llama.cpp computes for given tokens. usage: llama_logits MODEL.gguf TEXT OUT < ids, one per line
// Prints the ids of TEXT (a file) on stdout, one per line; writes the float32 logits behind every token to OUT, fed in one
// batch, and again behind each token fed alone. No repacked weights: that path crashes here.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

int main(int count, char ** arguments) {
    if (count != 4) return 2;
    std::vector<llama_token> ids;
    for (llama_token id; std::cin >> id;) ids.push_back(id);
    llama_model_params options = llama_model_default_params();
    options.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(arguments[1], options);
    if (!model) return 3;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::ostringstream text;
    text << std::ifstream(arguments[2], std::ios::binary).rdbuf();
    std::vector<llama_token> words(text.str().size() + 8);
    const int found = llama_tokenize(vocab, text.str().data(), text.str().size(), words.data(), words.size(), true, false);
    for (int index = 0; index < found; ++index) std::printf("%d\n", words[index]);
    llama_context_params context_options = llama_context_default_params();
    context_options.n_ctx = context_options.n_batch = context_options.n_ubatch = ids.size() + 8;
    context_options.n_threads = context_options.n_threads_batch = 1;  // on a busy machine more wait for each other, spinning
    std::ofstream out(arguments[3], std::ios::binary);
    for (const bool together : {true, false}) {
        llama_context * context = llama_init_from_model(model, context_options);
        if (!context) return 4;
        const int step = together ? ids.size() : 1;
        for (int first = 0; first < (int) ids.size(); first += step) {
            llama_batch batch = llama_batch_init(step, 0, 1);
            batch.n_tokens = step;
            for (int index = 0; index < step; ++index) {
                batch.token[index] = ids[first + index];
                batch.pos[index] = first + index;
                batch.n_seq_id[index] = 1;
                batch.seq_id[index][0] = 0;
                batch.logits[index] = 1;
            }
            if (llama_decode(context, batch)) return 5;
            for (int index = 0; index < step; ++index)
                out.write((const char *) llama_get_logits_ith(context, index), 4 * llama_vocab_n_tokens(vocab));
            llama_batch_free(batch);
        }
        llama_free(context);
    }
    llama_model_free(model);
}
