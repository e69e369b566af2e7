// Text to instructions. The grammar is that of nvcc's output, which is regular: one statement ends at each semicolon.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <optional>

#include "ptx.h"

namespace ptx {
namespace {

using Words = std::vector<std::string>;

std::string trimmed(const std::string& s) {
  const size_t begin = s.find_first_not_of(" \t\r\n"), end = s.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : s.substr(begin, end - begin + 1);
}
Words split(const std::string& s, char at) {
  Words words;
  for (size_t begin = 0, end; begin <= s.size(); begin = end + 1) {
    end = std::min(s.find(at, begin), s.size());
    words.push_back(trimmed(s.substr(begin, end - begin)));
  }
  return words;
}
bool starts_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }
// The text between two strings; "" if the first does not occur.
std::string between(const std::string& s, const std::string& before, const std::string& after) {
  const size_t begin = s.find(before);
  return begin == std::string::npos ? ""
                                    : s.substr(begin + before.size(), s.find(after, begin) - begin - before.size());
}

// 12, -12, 0x1f, 0f3F800000 (the bits of a float) or 0d3FF0000000000000.
std::optional<uint64_t> literal(const std::string& s) {
  if ((starts_with(s, "0f") && s.size() == 10) || (starts_with(s, "0d") && s.size() == 18))
    return std::stoull(s.substr(2), nullptr, 16);
  if (s.empty() || !(std::isdigit(s[0]) || (s[0] == '-' && s.size() > 1))) return {};
  return s[0] == '-' ? uint64_t(std::stoll(s, nullptr, 0)) : std::stoull(s, nullptr, 0);
}

const std::map<std::string, Op> kOps = {{"bra", Op::branch},
                                        {"bra.uni", Op::branch},
                                        {"ret", Op::exit},
                                        {"call.uni", Op::trap},
                                        {"bar.sync", Op::sync_block},
                                        {"bar.warp.sync", Op::sync_warp},
                                        {"shfl.sync.idx.b32", Op::shuffle_idx},
                                        {"shfl.sync.bfly.b32", Op::shuffle_xor},
                                        {"vote.sync.ballot.b32", Op::ballot},
                                        {"cp.async.cg.shared.global", Op::copy},
                                        {"cp.async.commit_group", Op::commit},
                                        {"cp.async.wait_group", Op::wait},
                                        {"fence.acq_rel.gpu", Op::fence},
                                        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", Op::ldmatrix},
                                        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", Op::ldmatrix_transposed},
                                        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", Op::mma_bf16},
                                        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", Op::mma_f16}};

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Module parse() {
    for (;;) {
      skip_space();
      if (at_ == text_.size()) return std::move(module_);
      if (next_is(".version") || next_is(".target") || next_is(".address_size")) until('\n');
      else if (next_is(".extern .shared")) declare(until(';'), kShared);
      else if (next_is(".extern .func __assertfail")) until(';');
      else if (next_is(".global")) global(until(';'));
      else if (next_is(".entry") || next_is(".visible .entry")) entry(until('{'));
      else refuse(text_.substr(at_, 80));
    }
  }

 private:
  std::string text_;
  size_t at_ = 0;
  Module module_;
  std::map<std::string, uint64_t> symbols_;
  // The kernel that is being parsed.
  Kernel* kernel_ = nullptr;
  std::map<std::string, int> registers_, labels_;
  std::map<uint64_t, int> immediates_;
  std::vector<std::pair<size_t, std::string>> jumps_;
  std::map<int, std::pair<int, int>> products_;  // rows with a product since the last label, and the factors

  [[noreturn]] void refuse(const std::string& what) const {
    throw simt::Error("PTX that the interpreter does not know: " + what);
  }
  void skip_space() {
    while (at_ < text_.size() && std::isspace(text_[at_])) ++at_;
  }
  bool next_is(const char* word) const { return text_.compare(at_, std::strlen(word), word) == 0; }
  std::string until(char end) {
    const size_t from = at_, to = text_.find(end, at_);
    if (to == std::string::npos) refuse("no '" + std::string(1, end) + "' after " + text_.substr(from, 80));
    at_ = to + 1;
    return text_.substr(from, to - from);
  }

  // "... NAME[...]"
  void declare(const std::string& s, uint64_t address) {
    const size_t end = s.find('['), begin = s.find_last_of(" \t", end) + 1;
    symbols_[s.substr(begin, end - begin)] = address;
  }
  void global(const std::string& s) {
    if (!starts_with(s, ".global .align 1 .b8 ")) refuse(s.substr(0, 80));
    const Words bytes = split(between(s, "{", "}"), ',');
    module_.strings.push_back(std::make_unique<char[]>(std::stoul(between(s, "[", "]"))));
    char* to = module_.strings.back().get();
    for (const std::string& byte : bytes) *to++ = char(std::stoi(byte));
    declare(s.substr(0, s.find('=')), uint64_t(module_.strings.back().get()) + kGlobal);
  }

  void entry(const std::string& head) {
    Kernel kernel;
    kernel.name = trimmed(between(head, ".entry", "("));
    const std::string parameters = between(head, "(", ")"), threads = between(head, ".maxntid ", ",");
    if (!starts_with(trimmed(parameters), ".param .align") || parameters.find(',') != std::string::npos)
      refuse("a kernel whose parameter is not one struct: " + head);
    kernel.parameter_bytes = std::stoul(between(parameters, "[", "]"));
    if (!threads.empty()) kernel.max_threads = unsigned(std::stoul(threads));
    declare(parameters, 0);
    kernel_ = &kernel;
    registers_.clear(), labels_.clear(), immediates_.clear(), jumps_.clear(), products_.clear();
    for (int depth = 1; depth > 0;) {
      skip_space();
      if (text_[at_] == '{') ++depth, ++at_;
      else if (text_[at_] == '}') --depth, ++at_;
      else if (text_[at_] == '$') labels_[until(':')] = int(kernel.code.size()), products_.clear();
      else statement(trimmed(until(';')));
    }
    for (const auto& [at, label] : jumps_) {
      if (!labels_.count(label)) refuse("no label " + label);
      kernel.code[at].target = labels_[label];
    }
    kernel_ = nullptr;
    module_.kernels[kernel.name] = std::move(kernel);
  }

  void statement(std::string s) {
    if (starts_with(s, ".reg") || starts_with(s, ".param") || starts_with(s, ".pragma")) return;
    Instruction i;
    i.text = s;
    std::replace(i.text.begin(), i.text.end(), '\n', ' ');
    if (s[0] == '@') {
      i.guard_negated = s[1] == '!';
      const size_t end = s.find_first_of(" \t"), begin = i.guard_negated ? 2 : 1;
      i.guard = row(s.substr(begin, end - begin));
      s = trimmed(s.substr(end));
    }
    const size_t end = std::min(s.find_first_of(" \t\n"), s.size());
    const std::string opcode = s.substr(0, end), rest = trimmed(s.substr(end));
    const Words words = split(opcode, '.');
    if (const auto op = kOps.find(opcode); op != kOps.end()) i.op = op->second;
    else if (words[0] == "mov" && rest.find('{') != std::string::npos) i.op = rest[0] == '{' ? Op::unpack : Op::pack;
    else if ((i.compute = find_arithmetic(opcode))) i.op = Op::arithmetic;
    else if (starts_with(opcode, "st.param")) i.op = Op::argument;
    else if (words[0] == "ld") i.op = Op::load;
    else if (words[0] == "st") i.op = Op::store;
    else if (opcode == "atom.global.add.u32" || opcode == "atom.shared.add.u32") i.op = Op::add;
    else refuse(i.text);

    if (i.op == Op::branch) {
      jumps_.emplace_back(kernel_->code.size(), rest);
    } else if (i.op == Op::trap) {
      if (rest.find("__assertfail") == std::string::npos) refuse(i.text);
    } else if (i.op == Op::argument) {
      if (!starts_with(rest, "[param0")) return;  // __assertfail's message is all that we want
      i.rows.push_back(row(split(rest, ',').at(1)));
    } else {
      operands(i, rest);
    }
    if (i.op >= Op::pack && i.op <= Op::unpack) i.bytes = width(words.back());
    if (i.op == Op::load || i.op == Op::store || i.op == Op::add) access(i, words);
    check_shape(i);
    fuse(i, opcode);
    kernel_->code.push_back(std::move(i));
  }

  // ptxas may fuse a product with a sum that it goes to, unless one of them says .rn: so they are fused here.
  void fuse(Instruction& i, const std::string& opcode) {
    if (opcode == "add.f32" && i.guard < 0)
      for (const size_t at : {1, 2})
        if (const auto product = products_.find(i.rows[at]); product != products_.end()) {
          i.compute = find_arithmetic("fma.rn.f32");
          i.rows = {i.rows[0], product->second.first, product->second.second, i.rows[3 - at]};
          break;
        }
    const size_t written = i.op == Op::arithmetic ? 1 : i.rows.size();
    for (size_t at = 0; at < written; ++at)
      std::erase_if(products_, [row = i.rows[at]](const auto& p) {
        return p.first == row || p.second.first == row || p.second.second == row;
      });
    if (opcode == "mul.f32" && i.guard < 0) products_[i.rows[0]] = {i.rows[1], i.rows[2]};
  }

  // The number of operands, and what must be constant.
  void check_shape(const Instruction& i) const {
    const auto is = [&](size_t row, uint64_t value) {
      const auto& all = kernel_->constants;
      return std::find(all.begin(), all.end(), std::pair(i.rows.at(row), value)) != all.end();
    };
    const size_t rows = i.rows.size();
    const bool ok = i.op == Op::sync_block  ? rows == 1 && is(0, 0)
                    : i.op == Op::copy      ? rows == 2 && is(0, 16) && i.addresses.size() == 2
                    : i.op == Op::sync_warp ? rows == 1
                    : i.op == Op::shuffle_idx || i.op == Op::shuffle_xor      ? rows == 6
                    : i.op == Op::ballot                                      ? rows == 3
                    : i.op == Op::ldmatrix || i.op == Op::ldmatrix_transposed ? rows == 4 && i.addresses.size() == 1
                    : i.op == Op::mma_bf16 || i.op == Op::mma_f16             ? rows == 14
                    : i.op == Op::load || i.op == Op::store ? rows == size_t(i.elements) && i.addresses.size() == 1
                    : i.op == Op::add                       ? rows == 2 && i.addresses.size() == 1
                                                            : rows <= 5;
    if (!ok) refuse(i.text);
  }

  static uint32_t width(const std::string& type) { return uint32_t(std::stoul(type.substr(1))) / 8; }

  // The suffixes of ld, st and atom: ".relaxed.gpu.global.s32", ".shared.v4.u32" ...
  void access(Instruction& i, const Words& words) const {
    bool gpu = false, placed = false;
    for (size_t w = 1; w + 1 < words.size(); ++w) {
      const std::string& word = words[w];
      if (word == "param") placed = true, i.space = Space::parameter;
      else if (word == "shared") placed = true, i.space = Space::shared;
      else if (word == "global") placed = true, i.space = Space::global;
      else if (word == "relaxed") i.order = Order::relaxed;
      else if (word == "release" && i.op == Op::store) i.order = Order::release;
      else if (word == "gpu") gpu = true;
      else if (word == "v2") i.elements = 2;
      else if (word == "v4") i.elements = 4;
      else if (word != "add") refuse(i.text);
    }
    i.bytes = width(words.back());
    if (!placed || (i.order != Order::weak) != gpu || words.back() == "s16" || i.bytes < 2) refuse(i.text);
  }

  void operands(Instruction& i, const std::string& s) {
    std::string word;
    const auto end_word = [&] {
      if (!word.empty()) i.rows.push_back(row(word));
      word.clear();
    };
    for (size_t at = 0; at < s.size(); ++at) {
      if (s[at] == '[') {
        const Words parts = split(s.substr(at + 1, s.find(']', at) - at - 1), '+');
        i.addresses.push_back({row(parts[0]), parts.size() > 1 ? literal(parts[1]).value() : 0});
        at = s.find(']', at);
      } else if (s[at] == '{') {
        const Words elements = split(s.substr(at + 1, s.find('}', at) - at - 1), ',');
        for (const std::string& element : elements) i.rows.push_back(row(element));
        i.elements = int(elements.size());
        at = s.find('}', at);
      } else if (s[at] == ',' || s[at] == '|') {
        end_word();
      } else if (!std::isspace(s[at])) {
        word += s[at];
      }
    }
    end_word();
  }

  int row(const std::string& name) {
    static const std::map<std::string, int> special{{"%tid.x", kThread},    {"%ntid.x", kThreads}, {"%ctaid.x", kBlock},
                                                    {"%nctaid.x", kBlocks}, {"%laneid", kLane},    {"_", kUnused}};
    if (const auto found = special.find(name); found != special.end()) return found->second;
    if (name[0] == '%' && name.find('.') == std::string::npos) {
      const auto [found, added] = registers_.try_emplace(name, kernel_->rows);
      kernel_->rows += added;
      return found->second;
    }
    std::optional<uint64_t> value = literal(name);
    if (!value && symbols_.count(name)) value = symbols_[name];
    if (!value) refuse("operand " + name);
    const auto [found, added] = immediates_.try_emplace(*value, kernel_->rows);
    if (added) kernel_->constants.emplace_back(kernel_->rows++, *value);
    return found->second;
  }
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace ptx
