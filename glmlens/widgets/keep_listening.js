// anywidget (0.11) stops receiving kernel messages if a widget's code arrives more than two seconds after the widget,
// as on a busy page: it then rejects every message for good. So send the widget a probe message. If it is rejected,
// install the ordinary message handler of ipywidgets, and request the state that was missed.

async function keepListening(model) {
  const widget = await model.widget_manager.get_model(model.get("page_id")).catch(() => null);
  if (!widget) return; // closed in the meantime
  const probe = { content: { data: { method: "custom", content: null } }, buffers: [] };
  widget._handle_comm_msg(probe).catch(() => {
    const ordinary = Object.getPrototypeOf(Object.getPrototypeOf(widget));
    widget.comm.on_msg(ordinary._handle_comm_msg.bind(widget));
    widget.comm.send({ method: "request_state" }, widget.callbacks());
  });
}

const initialize = ({ model }) => void keepListening(model);
