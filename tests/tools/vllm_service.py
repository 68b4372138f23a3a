"""A server as vLLM's, of the standard library, which draws from one of our own models token by token."""

import dataclasses
import http.server
import json
import threading

import torch

from minillm.config.engine import EngineConfig
from minillm.engine.pair import Draw, draw, engine_of
from minillm.model.head import CausalLM
from minillm.model.load import load_model
from minillm.model.sampling import Decoding, draw_uniforms

QUICK = EngineConfig(retries=2, timeout=20)


class Service:
    """Serves one of our models; `troubles` are what happens to the next requests: a status, or "cut"."""

    def __init__(self, lm, longest=512, root=""):
        self.lm, self.longest, self.root = lm, longest, str(root)
        self.troubles, self.asked, self.version, self.reloads, self.resets = [], [], "default", [], []
        service, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(service.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    trouble = service.troubles.pop(0) if service.troubles else None
                    if trouble == "cut":
                        return self.close_connection
                    if trouble == "restart":
                        service.version, trouble = "default", 503
                    if trouble is not None:
                        return self.send_error(trouble)
                    self.reply(service.post(self.path, body))

            def reply(self, value):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        class Plain(http.server.ThreadingHTTPServer):
            request_queue_size = 256

        self.server = Plain(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def get(self, path):
        if path == "/v1/models":
            return {"data": [{"id": "it", "root": self.root, "max_model_len": self.longest}]}
        assert path == "/weight_info"
        return {"weight_version": self.version}

    @torch.no_grad()
    def post(self, path, body):
        if path == "/collective_rpc":
            self.reloads.append(body["kwargs"]["weights_path"])
            self.lm = CausalLM(load_model(self.reloads[-1]))
        elif path == "/reset_prefix_cache" and self.resets:
            return {"success": self.resets.pop(0)}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/pooling":
            self.asked.append(body)
            states = [self.lm.model.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in body["input"]]
            if body["use_activation"]:
                states = [torch.nn.functional.normalize(each, dim=-1) for each in states]
            kind = getattr(torch, body["embed_dtype"])
            return torch.cat(states).to(kind).view(torch.uint8).numpy().tobytes()
        elif path == "/v1/completions":
            self.asked.append(body)
            generator = torch.Generator().manual_seed(body["seed"])
            tokens, logprobs = list(body["prompt"]), []
            for _ in range(body["max_tokens"]):
                logits = self.lm.model(torch.tensor([tokens])).logits[0, -1]
                for column, bias in (body["logit_bias"] or {}).items():
                    logits[int(column)] += bias
                law = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
                greedy = body["temperature"] == 0
                token = int(law.argmax() if greedy else torch.multinomial(law.exp(), 1, generator=generator))
                tokens.append(token)
                logprobs.append(float(law[token]))
                if token in body["stop_token_ids"]:
                    break
            written = tokens[len(body["prompt"]) :]
            return {"choices": [{"token_ids": written, "logprobs": {"token_logprobs": logprobs}}]}
        return {}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def answers(lm, service, prompts=((5, 6), (7,)), new_tokens=6, config=QUICK, seed=0, changes=False):
    engine = engine_of(lm, dataclasses.replace(config, url=service.url, teacher_url=service.url), changes=changes)
    how = Draw(lm, None, 0.0, Decoding(new_tokens, ()), lm.vocab_size)
    return draw(how, (engine, None), prompts, draw_uniforms(seed, new_tokens, len(prompts)))
