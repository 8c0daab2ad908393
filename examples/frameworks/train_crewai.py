"""Train the texts of a CrewAI crew."""

from crewai import Agent, Crew, Task

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
router = Agent(
    role="Router", goal="If no rule applies, answer sales.", backstory="You know the teams.", llm="openai/gpt-4o-mini"
)
route = Task(name="route", description="{ticket}", expected_output="the name of a team", agent=router)
crew = Crew(agents=[router], tasks=[route])

agent = trainable(crew)
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("crew.json")
