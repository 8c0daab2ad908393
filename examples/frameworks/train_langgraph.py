"""Train the prompt that a node of a LangGraph graph reads."""

from typing import TypedDict

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from aggregator import exact_match, optimize, trainable

tickets = [
    ("do you sell lamps", "sales"),
    ("the invoice is wrong", "billing"),
    ("my parcel is broken", "shipping"),
    ("a refund for the invoice", "billing"),
    ("where is my parcel", "shipping"),
    ("the refund did not come", "billing"),
    ("the courier lost my parcel", "shipping"),
    ("the courier never rang", "shipping"),
]
prompt = ChatPromptTemplate.from_messages([("system", "If no rule applies, answer sales."), ("human", "{ticket}")])
model = ChatOpenAI(model="gpt-4o-mini")


class State(TypedDict):
    ticket: str
    team: str


def route(state: State):
    return {"team": (prompt | model).invoke({"ticket": state["ticket"]}).text}


graph = StateGraph(State).add_node("route", route).add_edge(START, "route").add_edge("route", END).compile()

agent = trainable(graph, input="ticket", output="team")
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("graph.json")
