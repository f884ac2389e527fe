"""The two examples of the documentation with the LangChain packages of today, and what those add to them."""

import json

from langchain_classic.chains import LLMChain
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

QUESTION = "Why do I need to run machine learning models on-premise?"
CHAT_TEMPLATE = """<s>[INST] <<SYS>>
You are a helpful, respectful and honest assistant.
<</SYS>>

{user_message} [/INST]"""

chat = ChatOpenAI(base_url="http://localhost:8229/v1", api_key="random-string", max_tokens=4096)
first = chat.invoke([HumanMessage(content=QUESTION)])
prompt = PromptTemplate(input_variables=["user_message"], template=CHAT_TEMPLATE)
second = LLMChain(llm=chat, prompt=prompt).invoke({"user_message": QUESTION})["text"]

brief = ChatOpenAI(base_url="http://localhost:8229/v1", api_key="random-string", max_tokens=24, temperature=0)
talk = [SystemMessage("Be brief."), HumanMessage("Hello."), AIMessage("Hi."), HumanMessage("Once upon a time")]
whole = brief.invoke(talk)
pieces = [piece.content for piece in brief.stream(talk)]
likely = brief.bind(logprobs=True, top_logprobs=2).invoke(talk)
text = OpenAI(base_url="http://localhost:8229/v1", api_key="random-string", max_tokens=24, temperature=0)
print(
    json.dumps(
        {
            "first": first.content,
            "first_usage": first.usage_metadata,
            "second": second,
            "whole": whole.content,
            "pieces": pieces,
            "logprobs": len(likely.response_metadata["logprobs"]["content"]),
            "likely_usage": likely.usage_metadata,
            "completion": text.invoke("Once upon a time"),
            "completion_pieces": list(text.stream("Once upon a time")),
        }
    )
)
