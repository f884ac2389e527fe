"""lm-eval's local-completions on the task stories: accuracy, and the log-probability of each sentence's end.

Arguments: URL of the completions endpoint, folder of the tokenizer, folder of the task.
"""

import json
import os
import sys

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

url, tokenizer, tasks = sys.argv[1:]
os.chdir(tasks)  # the task names its data by a relative path
model = LocalCompletionsAPI(
    base_url=url,
    model="any",
    tokenizer=tokenizer,
    add_bos_token=True,
    num_concurrent=8,
    max_length=512,
    batch_size=2,
)
manager = TaskManager(include_path=tasks, include_defaults=False)
results = simple_evaluate(model, tasks=["stories"], task_manager=manager, log_samples=True, bootstrap_iters=0)
heard = []
for sample in results["samples"]["stories"]:
    for arguments, ((logprob, is_greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
        context, end = arguments
        context_ids, end_ids = model._encode_pair(context, end)
        heard.append({"context": context_ids, "end": end_ids, "logprob": logprob, "is_greedy": is_greedy})
print(json.dumps({"accuracy": results["results"]["stories"]["acc,none"], "heard": heard}))
