// The agent of tests/servers/agent.py on the server of `ws`; see there for what it answers.

import { setImmediate } from "node:timers/promises";
import { WebSocket, WebSocketServer } from "ws";

const STATUS = {
  "/native": { type: "STATUS", state: "ready", features: ["ids", "cancel"] },
  "/single": { type: "STATUS", state: "ready" },
};
const PING = Symbol("ping");
const PONGS = Symbol("pongs");
const ERROR = Symbol("error");

// A string is a chunk, a number the code to close with.
function* script(prompt) {
  const [command, argument] = prompt.split(" ");
  if (command === "!count") {
    for (let n = 0; n < Number(argument); n += 1) yield `${n} `;
  } else if (prompt === "!error") {
    yield ERROR;
  } else if (command === "!close") {
    yield "closing ";
    yield Number(argument);
  } else if (prompt === "!ping") {
    for (let n = 0; n < 10; n += 1) {
      yield PING;
      yield `${n} `;
    }
    yield PONGS;
  } else {
    yield* prompt.match(/[^ ]+ *|^ +/g) ?? [];
  }
}

class Agent {
  constructor(socket, withIds) {
    this.socket = socket;
    this.withIds = withIds;
    this.live = [];
    this.speaking = false;
    this.pings = 0;
    this.unanswered = new Set();
    this.allAnswered = () => {};
    socket.on("message", (data, isBinary) => this.hear(data, isBinary));
    socket.on("pong", (payload) => {
      this.unanswered.delete(payload.toString());
      if (this.unanswered.size === 0) this.allAnswered();
    });
  }

  hear(data, isBinary) {
    const { type, id, text } = isBinary ? {} : JSON.parse(data);
    const answer = this.live.find((other) => other.id === id);
    if (this.withIds !== (typeof id === "string")) {
      this.socket.close(1002, "an id is for the wire that has them, and there it is required");
    } else if (type === "USER_MESSAGE" && !(answer && this.withIds)) {
      this.live.push({ id, steps: script(text), chunks: 0 });
      this.speak();
    } else if (type === "CANCEL" && this.withIds) {
      if (answer) Object.assign(answer, { steps: [].values(), status: "cancelled" });
    } else {
      this.socket.close(1002, "the message is unknown, or its id is in use");
    }
  }

  // Answers for as long as something is live; one step at a time, of any answer that is due.
  async speak() {
    if (this.speaking) return;
    this.speaking = true;
    while (this.live.length > 0 && this.socket.readyState === WebSocket.OPEN) {
      const chosen = this.withIds ? Math.floor(Math.random() * this.live.length) : 0;
      await this.step(this.live[chosen]);
      await setImmediate(); // lets `hear` run, also where sending never has to wait
    }
    this.speaking = false;
  }

  async step(answer) {
    const { value, done } = answer.steps.next();
    if (done || value === ERROR) this.live.splice(this.live.indexOf(answer), 1);
    if (done) {
      await this.say(answer, "AGENT_EVENT_END", { tokens_used: answer.chunks, status: answer.status });
    } else if (value === ERROR) {
      await this.say(answer, "ERROR", { code: "refused", details: "as asked" });
    } else if (value === PING) {
      this.pings += 1;
      this.unanswered.add(`ping ${this.pings}`);
      this.socket.ping(`ping ${this.pings}`);
    } else if (value === PONGS) {
      await new Promise((resolve) => {
        this.allAnswered = resolve;
        if (this.unanswered.size === 0) resolve();
      });
    } else if (typeof value === "number") {
      this.socket.close(value, "as asked");
    } else {
      answer.chunks += 1;
      await this.say(answer, "AGENT_EVENT_TEXT_CHUNK", { text: value });
    }
  }

  // JSON.stringify leaves out what is undefined; a send that fails does so because the socket is closed.
  say(answer, type, fields) {
    const message = JSON.stringify({ type, id: answer.id, ...fields });
    return new Promise((resolve) => this.socket.send(message, resolve));
  }
}

const server = new WebSocketServer({
  host: "127.0.0.1",
  port: 0,
  verifyClient: ({ req }, respond) => respond(req.url in STATUS, 404),
});
server.on("connection", (socket, request) => {
  socket.send(JSON.stringify(STATUS[request.url]));
  new Agent(socket, request.url === "/native");
});
server.on("listening", () => console.log(`PORT ${server.address().port}`));
process.stdin.on("end", () => process.exit(0)).resume();
